// SPDX-License-Identifier: Apache-2.0

// Command runc-no-limits is runc for a cgroup v2 tree without controllers: runc refuses limits that
// it cannot set, and containerd always asks for some. It takes them out of the bundle's
// config.json, answers `runc update` with success, and becomes runc for the rest.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "runc-no-limits:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	command, bundle := parse(args)
	switch command {
	case "update":
		return nil
	case "create", "run":
		if err := dropLimits(filepath.Join(bundle, "config.json")); err != nil {
			return err
		}
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		return err
	}
	return syscall.Exec(runc, append([]string{runc}, args...), os.Environ())
}

// parse finds the subcommand and the bundle; runc's default bundle is the working folder.
func parse(args []string) (command, bundle string) {
	bundle = "."
	for i, arg := range args {
		switch arg {
		case "create", "run", "update":
			if command == "" {
				command = arg
			}
		case "--bundle", "-b":
			if i+1 < len(args) {
				bundle = args[i+1]
			}
		}
	}
	return command, bundle
}

// dropLimits keeps the device rules: they need no controller on cgroup v2.
func dropLimits(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var spec map[string]any
	decoder := json.NewDecoder(bytes.NewReader(content))
	decoder.UseNumber() // seccomp arguments use all 64 bits
	if err := decoder.Decode(&spec); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if linux, ok := spec["linux"].(map[string]any); ok {
		if resources, ok := linux["resources"].(map[string]any); ok {
			linux["resources"] = map[string]any{"devices": resources["devices"]}
		}
	}
	if content, err = json.Marshal(spec); err != nil {
		return err
	}
	return os.WriteFile(path, content, 0o600)
}
