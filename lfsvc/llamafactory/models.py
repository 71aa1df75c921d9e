"""Where a model lies on this machine, how large it is, and whether it is quantised already.

Standard library only: the runner asks before a merge.
"""

from __future__ import annotations

import os

from lfsvc.files import read_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# `consolidated*` is a second copy of the same weights, as Mistral publishes them.
NO_WEIGHTS = ("adapter_", "training_args", "optimizer", "scheduler", "consolidated")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def local_folder(name: str, working_directory: str, environment: Mapping[str, str], cache_dir: str = "") -> str:
    """The folder of a model_name_or_path: itself, or its snapshot in a hub's cache; "" where it is not found.

    `cache_dir` is the YAML's, "" where it names none.
    Source: the cache layout of huggingface_hub (models--ORG--NAME/snapshots/REVISION) and ModelScope.
    """
    path = os.path.join(working_directory, name)
    if os.path.isdir(path):
        return os.path.normpath(path)
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return ""
    home = environment.get("HOME") or os.path.expanduser("~")
    cache = environment.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    hub = cache_dir and os.path.join(working_directory, cache_dir)
    hub = (
        hub
        or environment.get("HF_HUB_CACHE")
        or os.path.join(environment.get("HF_HOME") or os.path.join(cache, "huggingface"), "hub")
    )
    snapshots = os.path.join(hub, "models--" + name.replace("/", "--"), "snapshots")
    try:
        found = [os.path.join(snapshots, revision) for revision in os.listdir(snapshots)]
    except OSError:
        found = []
    modelscope = environment.get("MODELSCOPE_CACHE") or os.path.join(cache, "modelscope", "hub")
    organisation, model = name.split("/")
    for root in (modelscope, os.path.join(modelscope, "models")):
        # ModelScope writes a dot in a name as three underscores.
        found += [os.path.join(root, organisation, spelt) for spelt in {model, model.replace(".", "___")}]
    found = [folder for folder in found if os.path.isfile(os.path.join(folder, "config.json"))]
    return max(found, key=os.path.getmtime, default="")


def weight_bytes(folder: str) -> int:
    """The size of a model's weights; 0 where none are found. Only its own folder counts, not checkpoints in it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    sizes = dict.fromkeys(WEIGHTS, 0)
    for name in names:
        extension = os.path.splitext(name)[1]
        if extension not in sizes or name.startswith(NO_WEIGHTS):
            continue
        try:
            sizes[extension] += os.stat(os.path.join(folder, name)).st_size
        except OSError:
            continue
    # Some repositories hold the same weights in several formats; one of them is loaded.
    return sizes[".safetensors"] or max(sizes.values())


def quantised_as(folder: str) -> str:
    """The method (gptq, awq, …) by which a model was quantised when it was made; "" for a plain one."""
    config = read_json(os.path.join(folder, "config.json"))
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not quantization:
        return ""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return str(method) if method else "quantised"
