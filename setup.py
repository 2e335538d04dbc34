"""Builds the Cython modules; everything else is in pyproject.toml.

Sources lie flat in ``pyx/``; the ``.pxd`` files that say what a module offers to the others lie beside the
Python modules in ``python/headrace``, so an installed headrace can be cimported.

Environment (for developers; an ordinary build needs none of them):

``HEADRACE_TRACE=1``    line tracing, for ``make coverage``
``HEADRACE_ASAN=1``     AddressSanitizer, for ``make asan``
``HEADRACE_JOBS=N``     parallel compilations (default: one per processor)
"""

from __future__ import annotations

import os

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = (
    "_pool",
    "_engine",
    "_uring",
    "_epoll",
    "_virtual",
    "_simulated",
    "_driver",
    "_model",
    "_loop",
    "_stream",
    "_listener",
    "_file",
    "_datagram",
    "_tls_pump",
    "_kerberos",
)
# What a change to a C header must rebuild: setuptools can't see through Cython.
HEADERS = {"_uring": ["pyx/uring_abi.h"]}

trace = os.environ.get("HEADRACE_TRACE") == "1"
asan = os.environ.get("HEADRACE_ASAN") == "1"

directives = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
    "embedsignature": True,
    "embedsignature.format": "python",
    "freethreading_compatible": False,
    "linetrace": trace,
}
compile_args = ["-O2", "-g0", "-fno-strict-aliasing", "-Wno-unused-function"]
link_args: list[str] = []
macros: list[tuple[str, str | None]] = []
if trace:
    macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]
if asan:
    compile_args = ["-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=address", "-Wno-unused-function"]
    link_args = ["-fsanitize=address"]

jobs = int(os.environ.get("HEADRACE_JOBS", "0")) or os.cpu_count() or 1
present = [name for name in MODULES if os.path.exists(f"pyx/{name}.pyx")]

# Cython looks for a module's own .pxd beside its .pyx only, and wouldn't notice that it has changed.
for name in present:
    generated, interface = f"build/cython/pyx/{name}.c", f"python/headrace/{name}.pxd"
    if os.path.exists(generated) and os.path.exists(interface):
        if os.path.getmtime(interface) > os.path.getmtime(generated):
            os.unlink(generated)

extensions = cythonize(
    [
        Extension(
            f"headrace.{name}",
            [f"pyx/{name}.pyx"],
            include_dirs=["pyx"],
            depends=HEADERS.get(name, []),
            extra_compile_args=compile_args,
            extra_link_args=link_args,
            define_macros=macros,
        )
        for name in present
    ],
    include_path=["python"],
    build_dir=None if trace else "build/cython",
    compiler_directives=directives,
    nthreads=jobs,
)

setup(ext_modules=extensions, options={"build_ext": {"parallel": jobs}})
