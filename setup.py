"""The package and its C core: pip install . | pip install -e . | python setup.py build_ext --inplace

ctypes calls the core, so it is one shared library for every Python and needs no headers of Python. libjpeg-turbo comes
from PyPI and is linked statically. VITLOCAL_JPEG=system links the system's library instead. CC names a C compiler.
Without one, the compiler is ziglang from PyPI.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from importlib import metadata, util
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "vitlocal" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

# --- the C core ------------------------------------------------------------------------------------------------------

NATIVE = "vitlocal/data/native"
# No fused multiply-adds: a box is the same on every machine, up to the last bits of the C library's exp and log.
FLAGS = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread", "-fPIC", "-shared"]
# The library exports our functions only: its libjpeg never mixes with another one of the process.
EXPORTS = "{ global: vitlocal_*; local: *; };\n"
JPEG, JPEG_VERSION = "comma-deps-libjpeg", "3.1.0.post92"  # a static libjpeg-turbo 3.1.0 with SIMD code and headers
ZIG = "ziglang==0.17.1"
ZIG_COMMAND = [sys.executable, "-m", "ziglang", "cc"]
# The target keeps zig from using instructions that only this machine has. glibc 2.28 is that of manylinux_2_28.
MACOS = sys.platform == "darwin"
ZIG_TARGET = [] if MACOS else ["-target", f"{platform.machine()}-linux-gnu.2.28"]
PROBE = "#include <pthread.h>\n#include <stdlib.h>\nvoid *probe(void) { return malloc(1); }\n"


def compiles(command: list[str]) -> bool:
    """Whether a compiler makes a shared library. One without the headers of the C library does not."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(PROBE)
        arguments = [*command, *FLAGS, str(source), "-o", f"{folder}/probe.so"]
        with suppress(OSError):
            return subprocess.run(arguments, capture_output=True).returncode == 0
    return False


def system_compiler() -> list[str] | None:
    """The command in CC, else the first of cc, gcc and clang that works; None if none does."""
    if stated := shlex.split(os.environ.get("CC", "")):
        return stated
    return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name) and compiles([name])), None)


def uses_system_jpeg() -> bool:
    choice = os.environ.get("VITLOCAL_JPEG", "")
    if choice not in ("", "system"):
        raise CompileError(f"VITLOCAL_JPEG is {choice!r}; expected system, or leave it unset for the one from PyPI")
    return choice == "system"


def jpeg_flags(scratch: Path) -> list[str]:
    """The flags that compile and link libjpeg-turbo, which is downloaded into ``scratch`` if it is not installed."""
    if uses_system_jpeg():
        return ["-ljpeg"]
    installed: Path | None = None
    with suppress(metadata.PackageNotFoundError):
        if metadata.version(JPEG) == JPEG_VERSION:
            installed = Path(str(metadata.distribution(JPEG).locate_file("libjpeg")))
    if installed is None:
        # Its package asks for Python 3.12, but has no code for Python.
        options = ["--quiet", "--no-deps", "--ignore-requires-python", "--only-binary", ":all:"]
        pip = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), f"{JPEG}=={JPEG_VERSION}"]
        if subprocess.run(pip).returncode:
            raise CompileError(
                f"libjpeg-turbo could not be downloaded: pip got no {JPEG} {JPEG_VERSION} for this machine. Check the "
                "network, name a folder that has its wheel (PIP_FIND_LINKS=FOLDER), or use the system's library: "
                "VITLOCAL_JPEG=system, which needs a C compiler and the headers (libjpeg-dev on Debian)"
            )
        for wheel in scratch.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(scratch)
        installed = next(scratch.rglob("libjpeg/install")).parent
    return [f"-I{installed}/install/include", f"{installed}/install/lib/libjpeg.a"]


def build_requirements() -> list[str]:
    """Packages that the build needs on this machine, for an isolated build environment."""
    zig = [] if system_compiler() else [ZIG]
    jpeg = f"{JPEG}=={JPEG_VERSION}" if sys.version_info >= (3, 12) else "pip"  # pip downloads it, see above
    return zig if uses_system_jpeg() else [*zig, jpeg]


class BuildCore(build_ext):
    """Compiles the core with one command, to a library without a Python version in its name."""

    def get_ext_filename(self, name: str) -> str:
        return f"{name.replace('.', os.sep)}.so"

    def build_extension(self, extension: Extension) -> None:
        compiler = system_compiler()
        if compiler is None and util.find_spec("ziglang"):
            compiler = [*ZIG_COMMAND, *ZIG_TARGET]
        if compiler is None:
            raise CompileError(
                "the C core needs a C compiler, and neither cc, gcc nor clang makes a library here. Install one (gcc "
                f"and libc6-dev on Debian), name one (CC=COMMAND), or run: {sys.executable} -m pip install {ZIG}"
            )
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            exports, library = Path(folder) / "exports", Path(folder) / "library.so"
            exports.write_text(EXPORTS)
            # On macOS each library finds its symbols in the one that it was linked with, and nothing needs hiding.
            hide = [] if MACOS else [f"-Wl,--version-script={exports}"]
            command = [*compiler, *FLAGS, *extension.sources, *jpeg_flags(Path(folder)), *hide, "-lm"]
            # zig would leave a cache of 100 MB in the home folder.
            caches = {f"ZIG_{kind}_CACHE_DIR": f"{folder}/{kind}" for kind in ("GLOBAL", "LOCAL")}
            try:
                subprocess.run([*command, "-o", str(library)], env={**os.environ, **caches}, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                why = f"exit status {error.returncode}" if isinstance(error, subprocess.CalledProcessError) else error
                message = f"{shlex.join(compiler)} does not compile the C core ({why}; see above)."
                if uses_system_jpeg():
                    message += " VITLOCAL_JPEG=system needs the headers of libjpeg-turbo (libjpeg-dev on Debian)."
                raise CompileError(message) from error
            beside = target.with_suffix(".new")  # a process may use the old one
            shutil.copy(library, beside)
            beside.replace(target)


class PlatformWheel(bdist_wheel):
    """One wheel of a platform is for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# --- the recipes -----------------------------------------------------------------------------------------------------


class BuildPackage(build_py):
    """Copies the recipes into the package of a wheel. An editable package finds them beside it."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for recipe in self.recipes():
                target = Path(self.build_lib) / "vitlocal" / recipe
                target.parent.mkdir(parents=True, exist_ok=True)
                self.copy_file(recipe, str(target))

    def recipes(self) -> list[str]:
        return sorted(str(path.relative_to(HERE)) for path in (HERE / "rcfg").rglob("*.yaml"))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self.recipes()]  # of a source archive


if __name__ == "__main__":  # tests/fuzz/fuzz.py uses jpeg_flags
    setup(
        name="vitlocal",
        version=VERSION,
        description="Train a Vision Transformer from scratch on a small budget, fed from FFCV files",
        long_description=(HERE / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="MIT",
        packages=find_packages(include=["vitlocal", "vitlocal.*"]),
        # An editable package is then a path. By default it is a finder, which loses to a folder named vitlocal, such as
        # the checkout itself for a script beside it.
        package_dir={"": "."},
        package_data={"vitlocal": ["py.typed", "models/*.json"]},
        ext_modules=[
            Extension(
                "vitlocal.data.native._native",
                [f"{NATIVE}/{name}.c" for name in ("crops", "resize", "exact", "jpeg", "batch", "encode")],
                depends=[f"{NATIVE}/native.h", f"{NATIVE}/passes.h"],
            )
        ],
        cmdclass={"build_ext": BuildCore, "build_py": BuildPackage, "bdist_wheel": PlatformWheel},
        entry_points={
            "console_scripts": [
                "vitlocal-write = vitlocal.launch:write",
                "vitlocal-train = vitlocal.launch:train",
                "vitlocal-predict = vitlocal.launch:predict",
                "vitlocal-sample = vitlocal.launch:sample",
                "vitlocal-export = vitlocal.launch:export",
                "vitlocal-bench = vitlocal.launch:bench",
            ]
        },
        # Build backends read it. `python setup.py build_ext` would install eggs, and finds what it needs itself.
        setup_requires=build_requirements() if "setuptools.build_meta" in sys.modules else [],
        python_requires=">=3.10,<3.15",
        # The tests passed with both ends of each range: the lower ends on Python 3.10, the upper on 3.11 and 3.12.
        install_requires=[
            "torch>=2.11,<2.16",
            "torchvision>=0.26,<0.30",
            "timm>=1.0.26,<1.1",  # older ones read a local folder's safetensors as a pickle
            "fastargs>=1.2.0,<1.3",
            "terminaltables>=3.1,<4",  # fastargs imports them and does not declare them
            "pyyaml>=6.0,<7",
            "numpy>=1.26,<2.6",
            "pillow>=10.4,<14",
            "pyarrow>=17,<27",
            "scipy>=1.11,<2",
            "safetensors>=0.4.5,<1",
            "tensorboard>=2.18,<3",
            "matplotlib>=3.9,<4",
            "tqdm>=4.66,<5",
        ],
        extras_require={
            "dev": [
                "pytest>=8,<10",
                "pytest-xdist>=3.6,<4",
                "ruff>=0.12,<0.18",
                "hypothesis>=6.130,<7",
                "mypy>=1.17,<3",
                "types-PyYAML",
                "types-tqdm",
                # Of docs/examples.
                "accelerate>=1.12,<2",
                "datasets>=4.4,<6",
                "lightning-fabric>=2.6,<3",
            ],
            "ffcv": [  # FFCV's own loader and writer; compiled by a C++ compiler, with OpenCV and libjpeg-turbo
                "ffcv>=1.0.2,<1.1",
                "numba>=0.61,<0.69",
                "opencv-python>=4.8,<6",
                "setuptools>=70.1,<85",  # ffcv imports distutils, which left the standard library in 3.12
            ],
            "diffusion": ["diffusers>=0.36,<1", "torch-fidelity>=0.3,<1"],  # autoencoders, Inception features
            "dali": ["nvidia-dali-cuda120>=1.50,<3"],  # works without a GPU, too
        },
    )
