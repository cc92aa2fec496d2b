"""Eight simulated devices, programs compiled quickly rather than well, no search for accelerators."""

import atexit
import os
import shutil
import tempfile

# Before JAX is imported.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Before transformers is imported: where it keeps copies of the code in the folders it loads.
_modules = tempfile.mkdtemp(prefix="modules_")
atexit.register(shutil.rmtree, _modules, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = _modules
