"""What a server that is about to load a model asks of those that are on its device already."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from sglang_vtensor.arrival import BESIDE_BYTES, Arrival, weights_bytes
from sglang_vtensor.neighbours import Neighbours, NoNeighbours
from sglang_vtensor.vmm import Unsupported, device_identity, free_bytes

logger = logging.getLogger(__name__)


def arrive(settings: Any, gpu_id: int) -> Arrival | None:
    """Ask those on the device, and those that come to it meanwhile, for room for the weights and what is beside them,
    and wait until it is there or no more comes. None where no device is shared, or this server is one of several ranks,
    which take no part in that."""
    if settings.tp_size * settings.pp_size > 1:
        return None
    device = f"cuda:{gpu_id}" if settings.device == "cuda" else settings.device
    identity = device_identity(device)
    if identity is None:
        return None
    try:
        neighbours = Neighbours(identity)
    except NoNeighbours:
        return None  # it is said when the KV cache is there
    needed = weights_bytes(_folder_of(settings.model_path)) + (BESIDE_BYTES if settings.device == "cuda" else 0)
    arrival = Arrival(neighbours, needed, held=lambda: _taken(device), free=lambda: free_bytes(device))
    try:
        arrival.wait()
    except Unsupported as error:
        logger.warning("%s: this server asks the others on it for memory, and does not wait for that", error)
    return arrival


def _taken(device: str) -> int:
    """Bytes that torch has of a device by now."""
    return int(torch.cuda.memory_reserved(device)) if device != "cpu" else 0


def _folder_of(model: str) -> str:
    """The folder of a model, which may be named as on the hub; the name itself if nothing of it is here."""
    if Path(model).exists():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(model, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return model
