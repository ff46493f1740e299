"""The architecture of the GPU, by which launchers choose tiles, warps and stages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
import triton

Configuration = TypeVar("Configuration")
# The version of Triton, such as (3, 6, 0): compilers of older ones need other tiles.
TRITON = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))


def architecture(device: torch.device) -> str:
    """The architecture of a device: "sm_80" and so on, or "gfx942".

    It is that of the device which holds the tensors of a launch, because a machine can have unlike GPUs. Launches on
    CPU tensors are interpreted, as on "sm_80", or compiled for the target of Triton's active driver.
    """
    if triton.knobs.runtime.interpret:
        return "sm_80"
    if device.type == "cpu":
        target = triton.runtime.driver.active.get_current_target()
        return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).partition(":")[0]
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def configuration(table: Mapping[str, Configuration], device: torch.device) -> Configuration:
    """The row of a launcher's table for the architecture of a device.

    A row is also for newer GPUs of NVIDIA, up to the next row; sm_80 is the oldest architecture that the kernels
    support. All GPUs of AMD take the row of gfx942.
    """
    name = architecture(device)
    if not name.startswith("sm_"):
        return table["gfx942"]
    rows = sorted((int(row[3:]), row) for row in table if row.startswith("sm_"))
    return table[[row for version, row in rows if version <= int(name[3:])][-1]]


def enough_registers(device: torch.device) -> dict[str, int]:
    """The option of a launch by which a thread may have all 255 registers, for NVIDIA and Triton before 3.8.

    The ptxas of these, 12.8, spills some words to fit one more program on a multiprocessor.
    """
    return configuration({"sm_80": {"maxnreg": 255}, "gfx942": {}}, device) if TRITON < (3, 8) else {}
