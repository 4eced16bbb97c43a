"""`python -m tests.make_interop FOLDER`: an environment with optimum-onnx, once; prints its interpreter."""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

# torch's exact version: a range would replace a CPU build by gigabytes of CUDA packages
PACKAGES = (
    "torch==2.13.0",
    "optimum-onnx==0.1.0",
    "transformers==4.57.6",
    "diffusers==0.39.0",
    "onnxruntime",
    "accelerate",
)


def main() -> None:
    folder = Path(sys.argv[1])
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    made = folder / "made"
    if not made.is_file() or made.read_text() != "\n".join(PACKAGES):
        venv.create(folder, with_pip=True, clear=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
        subprocess.run(install, check=True, stdout=sys.stderr)
        made.write_text("\n".join(PACKAGES))
    print(python)


if __name__ == "__main__":
    main()
