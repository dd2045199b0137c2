"""The MCU target: a C99 library with a static arena, and the machines it is tested on."""

from edgemat.targets.mcu.emulator import MACHINES, run_emulated
from edgemat.targets.mcu.generator import export, project
from edgemat.targets.mcu.host import HostProgram, run_host
from edgemat.targets.mcu.library import Project

__all__ = ["MACHINES", "HostProgram", "Project", "export", "project", "run_emulated", "run_host"]
