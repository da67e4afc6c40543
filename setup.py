"""The package: ``pip install .`` compiles FFCV too; ``make setup`` installs the system packages that this needs."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in (Path(__file__).parent / "vitlocal" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

NATIVE = "vitlocal/data/native"

setup(
    name="vitlocal",
    version=VERSION,
    description="Train a Vision Transformer from scratch on a small budget, fed by FFCV",
    long_description=(Path(__file__).parent / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["vitlocal", "vitlocal.*"]),
    package_data={"vitlocal": ["py.typed"]},
    ext_modules=[
        Extension(
            "vitlocal.data.native._native",
            [f"{NATIVE}/{name}.c" for name in ("crops", "resize", "exact", "jpeg", "batch", "encode")],
            depends=[f"{NATIVE}/native.h", f"{NATIVE}/passes.h"],
            libraries=["jpeg", "m"],
            # No fused multiply-adds: a box is the same on every machine.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"],
            py_limited_api=True,
        )
    ],
    python_requires=">=3.10,<3.13",
    # The tests have passed with both ends of every range: the lower ends on Python 3.10, the upper on 3.11 and 3.12.
    install_requires=[
        "torch>=2.11,<2.16",
        "torchvision>=0.26,<0.30",
        "timm>=1.0.26,<1.1",  # older ones read a local folder's safetensors as a pickle
        "ffcv>=1.0.2,<1.1",
        "fastargs>=1.2.0,<1.3",
        "terminaltables>=3.1,<4",  # fastargs imports them and does not declare them
        "pyyaml>=6.0,<7",
        "numba>=0.61,<0.69",
        "numpy>=1.26,<2.6",
        "opencv-python>=4.8,<6",
        "pillow>=10.4,<14",
        "pyarrow>=17,<27",
        "scipy>=1.11,<2",
        "safetensors>=0.4.5,<1",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
        "tqdm>=4.66,<5",
        "setuptools>=70,<85",  # ffcv imports distutils, which left the standard library in 3.12
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.12,<0.18",
            "mypy>=1.17,<3",
            "types-PyYAML",
            "types-tqdm",
        ],
        "dali": ["nvidia-dali-cuda120>=1.50,<3"],  # works without a GPU, too
    },
)
