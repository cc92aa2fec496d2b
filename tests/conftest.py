"""Eight simulated devices, programs compiled quickly rather than well, no search for accelerators."""

import atexit
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile

import pytest

# Tracing makes objects by the million, and all that JAX and the tests before have left is walked
# through whenever some thousands more have come than gone: as often, that is a twelfth of the time.
gc.set_threshold(50_000, 10, 2)

# Before JAX is imported.
flags = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# Later versions have no other emitters; libtpu ends a process over a flag that it does not know.
older = importlib.metadata.version("jaxlib").startswith("0.10.")
if older and importlib.util.find_spec("libtpu") is None:
    flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Many tests train the same tiny network: each of its programs is compiled once for all processes.
# The first one is here before those that share the tests, which inherit the name of the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="compiled_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Before transformers is imported: where it keeps copies of the code in the folders it loads.
_modules = tempfile.mkdtemp(prefix="modules_")
atexit.register(shutil.rmtree, _modules, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = _modules


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module():
    """JAX keeps all that it has compiled, which comes to gigabytes; other modules have other networks."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def shared_programs():
    """Runs of one configuration share their programs, which are made without data and without arrays.

    For tests of what is around a run: how it is saved, stopped, resumed, begun elsewhere. Else all runs of
    such a file would trace the same network anew, which takes longer than they do.
    """
    from mobilellm_jax.training import setup

    apart = "plan init_from init_state stage init_stage checkpoint eval profile".split()
    made, programs = {}, setup.programs

    def shared(config, devices, *given, pruner=None):
        own = config.copy_and_resolve_references()
        read = {key: value for key, value in own.to_dict().items() if key not in apart}
        smaller = pruner and (pruner.compact.config, repr(pruner.compact.to_dict()))
        key = repr(sorted(read.items())), *devices, *given, smaller
        if key not in made:
            made[key] = programs(own, devices, *given, pruner=pruner)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "programs", shared)
        yield
