"""Which GPUs a process of Ray's computes on: those that Ray has given it, and no others.

Ray sets CUDA_VISIBLE_DEVICES for who asks for GPUs, and leaves all of a machine's to who asks for none; libraries then
take the first.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import ray._private.thirdparty.pynvml as _pynvml

from lorauter.errors import ConfigError

pynvml: Any = _pynvml


def own_gpus_only() -> None:
    """Hide the GPUs that this process has not asked for; called before anything looks for one."""
    if ray.is_initialized() and not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def gpu_bytes() -> int:
    """The memory of this machine's smallest GPU; 0 where there is none, or one is in parts. Nothing is taken of it."""
    if "MIG" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        return 0
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        if any(_is_in_parts(handle) for handle in handles):
            return 0
        return min((pynvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles), default=0)
    except pynvml.NVMLError:
        return 0


def _is_in_parts(handle: Any) -> bool:
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except pynvml.NVMLError:  # it cannot be
        return False


def resources() -> dict[str, float]:
    """What the cluster has, by Ray's names; nothing where this process is in none."""
    there: dict[str, float] = ray.cluster_resources() if ray.is_initialized() else {}  # type: ignore[no-untyped-call]
    return there


def engine_gpus(device: str, asked: float | None, *, engines: int = 1, setting: str) -> float:
    """How many GPUs a process with an engine asks Ray for.

    Args:
        device: the engine's setting.
        asked: what the configuration says; None is one, with "auto" if the cluster has as many as there are engines.
        engines: how many processes there will be at least.
        setting: what `asked` is called.

    Raises:
        ConfigError: it is to compute on a GPU, and asks for none.
    """
    if asked is None:
        return float(device.startswith("cuda") or (device == "auto" and resources().get("GPU", 0) >= engines))
    if device.startswith("cuda") and not asked:
        raise ConfigError(
            f"engine.device is {device!r}, but {setting} is 0; give it 1, or take 'auto' or 'cpu'",
            setting="engine.device",
        )
    return asked
