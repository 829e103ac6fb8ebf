"""Compiles kernels for a GPU that need not be present; prints properties of the machine code, one JSON line per case.

    python -m tests.gate.worker 90 combine kan_linear
    python -m tests.gate.worker 90 --few combine       without the rare cases
    python -m tests.gate.worker 90 --ones combine      each kernel once, every integer that it specialises on equal to 1

It runs in a separate process, since Triton's interpreter cannot be switched off once it is on.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Case:
    """One shipped configuration of one kernel.

    ``types``: types of the run-time arguments, such as ``"*bf16"`` or ``"i32"``. ``constants``: the compile-time
    arguments. ``aligned``: pointers aligned to 16 bytes, and integers that are multiples of 16.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    rare: bool = False  # much like another case; left out with --few
    only: int | None = None  # the only GPU that it is shipped for


def specialised(kernel: Any) -> set[str]:
    """The arguments of a kernel on whose values Triton specialises: a 1 becomes a constant."""
    return {parameter.name for parameter in kernel.params if not parameter.do_not_specialize}


def with_constants(case: Case, ones: set[str]) -> Case:
    """A case in which these arguments are 1 and therefore constants."""
    return replace(
        case,
        types={name: kind for name, kind in case.types.items() if name not in ones},
        constants=case.constants | dict.fromkeys(ones, 1),
        aligned=tuple(name for name in case.aligned if name not in ones),
    )


def with_ones(cases: Iterable[Case]) -> Iterator[Case]:
    """The first case of each kernel with integers equal to 1, which Triton passes to the kernel as constants."""
    seen = set()
    for case in cases:
        if case.kernel.fn.__name__ in seen:
            continue
        seen.add(case.kernel.fn.__name__)
        ones = {name for name, kind in case.types.items() if kind == "i32"} & specialised(case.kernel)
        yield replace(with_constants(case, ones), name=f"ones-{case.name}")


def inspect(case: Case, capability: int) -> dict[str, Any]:
    """Registers, stack, shared memory and instruction counts of the compiled kernel."""
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        signature={name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", _dump("-res-usage", file.name)))
        sass = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", _dump("-sass", file.name), re.M)

    def count(pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in sass)

    return {
        "case": case.name,
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "spills": count(r"(LDL|STL)\b"),
        "shared": compiled.metadata.shared,
        "instructions": len(sass),
        "loads": count(r"(LDG|LDGSTS)\b"),
        "loads_128": count(r"(LDG|LDGSTS)\b.*\.128\b"),
        "loads_narrow": count(r"LDG\b.*\.[US](8|16)\b"),
        "stores": count(r"STG\b"),
        "stores_128": count(r"STG\b.*\.128\b"),
        "atomics": count(r"(ATOM|RED)[GS]?\b"),
        "carried": [line.count("=") for line in re.findall(r"scf\.for .*iter_args\((.*?)\)", compiled.asm["ttir"])],
        "tensor_core": count(r"(HMMA|HGMMA|UTC\w*MMA)"),
    }


def _dump(flag: str, path: str) -> str:
    return subprocess.run([str(CUOBJDUMP), flag, path], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    capability, *operations = sys.argv[1:]
    flags = {name for name in operations if name.startswith("--")}
    for operation in (name for name in operations if name not in flags):
        cases = importlib.import_module(f"tests.gate.{operation}").cases()
        for case in with_ones(cases) if "--ones" in flags else cases:
            if ("--few" in flags and case.rare) or case.only not in (None, int(capability)):
                continue
            print(json.dumps(inspect(case, int(capability))), flush=True)
