# SPDX-License-Identifier: Apache-2.0
"""From the operator's selector and class numbers to the agent's own class numbers.

Wire numbers mean something only together with the operator instance that sent them; contents
(selector keys, named ports) mean the same everywhere, so they decide about the agent's numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from weir.agent import resources
from weir.agent.classes import NOTHING, ClassContent, Numbers
from weir.agent.policy import PolicyTables
from weir.agent.resources import WireClass, WireSelector

CLASS_UNKNOWN = 1
CLASS_WORLD = 2
CLASS_HOST = 3
CLASS_FIRST = 16


class Identity:
    """Owns wire selectors and classes, and tells `policy` which numbers are in use."""

    def __init__(self, numbers: Numbers[ClassContent], policy: PolicyTables) -> None:
        self.numbers = numbers
        self._policy = policy
        self._selectors: dict[WireSelector, str] = {}
        self._wire: dict[WireClass, resources.Class] = {}
        self._resolved: dict[WireClass, int] = {}
        self._uses: dict[int, int] = {}
        self._dirty: set[WireClass] = set()
        self._idle: set[int] = set()
        self.selectors_changed = False

    # ---- inputs

    def set_selector(self, number: WireSelector, key: str | None) -> None:
        old = self._selectors.get(number)
        if key == old:
            return
        if key is None:
            del self._selectors[number]
        else:
            self._selectors[number] = sys.intern(key)
        self.selectors_changed = True

    def set_class(self, number: WireClass, item: resources.Class | None) -> None:
        if item is None:
            self._wire.pop(number, None)
        else:
            self._wire[number] = item
        self._dirty.add(number)

    # ---- resolution

    def selector_key(self, number: WireSelector) -> str:
        """An unknown selector is a key of its own that matches nothing but itself."""
        return self._selectors.get(number) or f"?{number}"

    def knows_selectors(self, numbers: Iterable[WireSelector]) -> bool:
        return all(number in self._selectors for number in numbers)

    def resolve(self) -> set[WireClass]:
        """Give numbers to changed wire classes. Returns those whose number changed."""
        dirty, self._dirty = self._dirty, set()
        if self.selectors_changed:
            dirty |= self._wire.keys()
        changed: set[WireClass] = set()
        for wire in dirty:
            item = self._wire.get(wire)
            old = self._resolved.get(wire)
            new = self.use(self._content(item)) if item is not None else None
            if old is not None:
                self.unuse(old)
            if new is not None:
                self._resolved[wire] = new
            else:
                self._resolved.pop(wire, None)
            if old != new:
                changed.add(wire)
        return changed

    def settle(self) -> None:
        """Take classes that nothing uses any more out of the policy join."""
        idle, self._idle = self._idle, set()
        for number in idle:
            if number not in self._uses:
                self._policy.remove_class(number)
                self.numbers.release(number)
        self.selectors_changed = False

    def number(self, wire: WireClass) -> int:
        return self._resolved.get(wire, CLASS_UNKNOWN)

    def content(self, number: int) -> ClassContent:
        """NOTHING for the fixed numbers."""
        return self.numbers.key(number) or NOTHING

    def known(self, wire: WireClass) -> bool:
        return wire in self._resolved

    def use(self, content: ClassContent) -> int:
        number = self.numbers.number(content)
        if number is not None and number in self._uses:
            self._uses[number] += 1
            return number
        if number is not None and number in self._idle:
            self._idle.discard(number)
        else:
            number = self.numbers.acquire(content)
        self._uses[number] = 1
        self._policy.add_class(number, content)
        return number

    def unuse(self, number: int) -> None:
        if number < CLASS_FIRST:
            return
        self._uses[number] -= 1
        if not self._uses[number]:
            del self._uses[number]
            self._idle.add(number)

    def _content(self, item: resources.Class) -> ClassContent:
        keys = frozenset(self.selector_key(number) for number in item.selectors)
        return ClassContent(keys, frozenset(item.named_ports))
