"""Planted bugs. Each must make the tests named beside it fail; ``python -m tests.mutants`` plants them one by one in a copy of the tree."""

import hashlib
import sys
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Suite:
    """How tests are run on a tree: the commands before them (a build), the command that takes the tests' names, the environment."""

    command: tuple[str, ...] = (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider")
    before: tuple[tuple[str, ...], ...] = ()
    environment: dict[str, str] = field(default_factory=dict, hash=False)
    # Exit status when a test failed. Others (a wrong name, nothing collected) mean that nothing was shown.
    failed: int = 1
    # Whether an illegal access ends the process, which then says as much as a failed test: kernels that run on the CPU.
    crashes: bool = False
    # What a failure says when the planted code does not run at all: then it shows nothing about the tests.
    broken: str = (
        r"^E .*\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError|CompilationError"
        r"|InterpreterError: (InterpreterError\([\\'\"]*)*(?!InterpreterError|KernelMemoryError|AssertionError|NotImplementedError)\w+)\b"
    )


@dataclass(frozen=True)
class Mutant:
    """``old``, which is in ``file`` once, becomes ``new``; ``tests`` are arguments of the suite's command."""

    kind: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    suite: Suite

    def planted(self, text: str) -> str:
        if text.count(self.old) != 1:
            raise ValueError(f"{self}: its old text is {text.count(self.old)} times in the file, must be there once:\n{self.old}")
        return text.replace(self.old, self.new)

    @property
    def key(self) -> str:
        """Changes with the mutant and with its tests' names."""
        return hashlib.sha256(repr((self.file, self.old, self.new, self.tests)).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}: {self.new.strip().splitlines()[0] if self.new.strip() else 'line gone'}"
