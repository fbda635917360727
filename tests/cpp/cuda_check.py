"""Compiles the device code with nvcc, without a GPU: no warnings, and no register spilled to memory.

Every header of csrc/core (through device_check.cu) and every csrc/cuda/*.cu (against torch's stable headers), whose PTX
holds no float64 arithmetic, no local memory, and the instructions named in `INSTRUCTIONS`, and whose inner loop has few
instructions beside its products.
`--find` only prints the toolkit; exit status 1 and the reason if there is none.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("80", "90", "100", "120")
#: What the speed of a kernel rests on: matrix units and their loads, 16 bytes at a time.
INSTRUCTIONS = {
    "decode_samples": (
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16",
        "ldmatrix.sync.aligned.m8n8.x4",
        "ld.global.nc.v4",
    ),
}


def load_setup():
    spec = importlib.util.spec_from_file_location("purify_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spills(log: str) -> list[str]:
    """What ptxas says of each kernel that spills: 'name (arch): n bytes stores, m bytes loads'."""
    found, kernel = [], ""
    for line in log.splitlines():
        entry = re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)
        if entry:
            kernel = f"{entry[1]} ({entry[2]})"
        spill = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spill and (spill[1] != "0" or spill[2] != "0"):
            found.append(f"{kernel}: {spill[1]} bytes spilled, {spill[2]} loaded")
    return found


def missing_or_wrong(ptx: str, name: str) -> list[str]:
    """What the PTX of csrc/cuda/<name>.cu should not have, and has, or the other way round."""
    found = [f"no {instruction}" for instruction in INSTRUCTIONS[name] if instruction not in ptx]
    # tests/aot asks the same of the Triton kernels
    return found + [f"{what} in the PTX" for what in (".f64", ".local") if re.search(rf"\{what}\b", ptx)]


#: Most instructions of sm_90 for 64 matrix instructions, from the first load of their rows to the last of them: a
#: multiprocessor then issues them faster than its matrix units take them.
MOST = 110


def loops(sass: str) -> list[tuple[int, int]]:
    """Instructions and matrix instructions of each stretch without a branch that loads rows and multiplies them."""
    found, first, last, products = [], None, 0, 0
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass, re.M)
    for at, one in enumerate([*code, "EXIT"]):
        if re.search(r"\b(BRA|BSYNC|EXIT|BAR)\b", one):
            found += [(last - first + 1, products)] if first is not None and products else []
            first, products = None, 0
        elif re.search(r"\b(LDSM|HMMA)\b", one):
            first = at if first is None else first
            if "HMMA" in one:
                last, products = at, products + 1
    return found


def too_long(sass: str) -> list[str]:
    """What is wrong with the loop over taps and channels of decode_samples, compiled for sm_90."""
    found = loops(sass)
    if not found or max(products for _, products in found) != 64:
        return [f"no stretch of 64 matrix instructions without a branch: {found}"]
    return [
        f"{length} instructions for 64 products, more than {MOST}" for length, n in found if n == 64 and length > MOST
    ]


def disassembled(toolkit: Path, binary: Path) -> str:
    """The machine code for sm_90 in an object file; Triton brings the disassembler that a bare toolkit lacks."""
    triton = importlib.util.find_spec("triton")
    folders = [toolkit / "bin"]
    if triton is not None and triton.submodule_search_locations:
        folders.append(Path(triton.submodule_search_locations[0]) / "backends/nvidia/bin")
    tool = next(folder / "cuobjdump" for folder in folders if (folder / "cuobjdump").exists())
    command = [tool, "-sass", "-arch", "sm_90", binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--find", action="store_true", help="print the toolkit's folder and stop")
    args = parser.parse_args()
    setup = load_setup()
    try:
        toolkit = setup.find_toolkit(os.environ)
    except setup.Impossible as reason:
        print(reason, file=sys.stderr)
        return 1
    if args.find:
        print(toolkit)
        return 0

    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        print("torch is not importable: its headers are needed for csrc/cuda", file=sys.stderr)
        return 1
    include = Path(torch.submodule_search_locations[0]) / "include"
    missing = {header.name for header in ROOT.glob("csrc/core/*.h")} - set(
        re.findall(r'"core/(\w+\.h)"', (ROOT / "tests/cpp/device_check.cu").read_text())
    )
    failures = [f"tests/cpp/device_check.cu does not include {name}" for name in sorted(missing)]
    kernels = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in [ROOT / "tests/cpp/device_check.cu", *sorted(ROOT.glob("csrc/cuda/*.cu"))]:
            out = Path(folder) / "out"
            nvcc = [toolkit / "bin/nvcc", source, "-o", out, "-I", ROOT / "csrc"]
            for system in (include, include / "torch/csrc/api/include", toolkit / "include"):
                nvcc += ["-isystem", system]
            nvcc += [*setup.NVCC_FLAGS, *setup.DEFINES, "--Werror", "all-warnings"]
            command = [*nvcc, "-c", "-Xptxas", "-v", "--threads", str(os.cpu_count())]
            command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
            run = subprocess.run(command, capture_output=True, text=True)
            log = run.stdout + run.stderr
            kernels += log.count("Compiling entry function")
            name = source.relative_to(ROOT)
            if run.returncode:
                failures.append(f"{name} does not compile:\n{log}")
            failures += [f"{name}: {line}" for line in spills(log)]
            if source.suffix == ".cu" and source.parent.name == "cuda":
                failures += [f"{name}: {line}" for line in too_long(disassembled(toolkit, out))]
                subprocess.run([*nvcc, "-ptx", f"-arch=compute_{ARCHS[0]}"], check=True)
                failures += [f"{name}: {line}" for line in missing_or_wrong(out.read_text(), source.stem)]
            print(f"{name}: {log.count('Compiling entry function')} kernels", flush=True)
    print(f"{kernels} kernels for sm_{', sm_'.join(ARCHS)}: {len(failures)} failures")
    print("\n".join(failures))
    return 1 if failures or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
