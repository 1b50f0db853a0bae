# SPDX-License-Identifier: Apache-2.0
"""From the operator's selector and class numbers to the agent's own class numbers.

Wire numbers mean something only together with the operator instance that sent them; contents
(selector keys, named ports) mean the same everywhere, so they decide about the agent's numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

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
        self._by_key: dict[str, WireSelector] = {}
        # An operator has one number for a key. Should two come, policies of both are enforced.
        self._twins: dict[str, set[WireSelector]] = {}
        self._highest = 0
        self._missing: set[WireSelector] = set()  # asked for, and not there
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
        if old is not None:
            self._forget(old, number)
        if key is None:
            del self._selectors[number]  # who used it comes anew, or goes, in the same change
            return
        self._selectors[number] = key = sys.intern(key)
        twin = self._by_key.setdefault(key, number)
        if twin != number:
            self._twins.setdefault(key, set()).add(number)
        # An operator's numbers rise: those who use a new one come with it. An earlier one with
        # another key is another operator's.
        if number <= self._highest or number in self._missing:
            self.selectors_changed = True
            self._missing.clear()
        self._highest = max(self._highest, number)

    def _forget(self, key: str, number: WireSelector) -> None:
        twins = self._twins.get(key, set())
        if self._by_key.get(key) != number:
            twins.discard(number)
        elif twins:
            self._by_key[key] = twins.pop()
        else:
            del self._by_key[key]
        if not twins:
            self._twins.pop(key, None)

    def set_class(self, number: WireClass, item: resources.Class | None) -> None:
        if item is None:
            self._wire.pop(number, None)
        else:
            self._wire[number] = item
        self._dirty.add(number)

    # ---- resolution

    def selector_key(self, number: WireSelector) -> str:
        """An unknown selector is a key of its own that matches nothing but itself."""
        key = self._selectors.get(number)
        if key is None:
            self._missing.add(number)
            return f"?{number}"
        return key

    def selector_numbers(self, key: str) -> Iterator[WireSelector]:
        """The other way round."""
        if key.startswith("?"):
            yield WireSelector(int(key[1:]))
        elif (number := self._by_key.get(key)) is not None:
            yield number
            yield from self._twins.get(key, ())

    def knows_selectors(self, numbers: Iterable[WireSelector]) -> bool:
        missing = {number for number in numbers if number not in self._selectors}
        self._missing |= missing
        return not missing

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
