"""The generated C library: an index that is no row of its table is a status, and nothing is computed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
from torch import nn

import edgemat
from edgemat.lower.reader import read
from edgemat.targets import toolchain
from edgemat.targets.mcu.generator import export, project

PROGRAM = """
#include "model.h"
int main(void) {{
    static int64_t arena[{u}_ARENA_BYTES / 8 + 1];
    {p} model;
    {p}_input_t code[1] = {{4}};
    {p}_output_t out[{u}_OUTPUT_SIZE];
    const float good = 4.0f, over = 5.0f, far = 1e9f, under = -1.0f, between = 0.5f;
    if ({p}_init(&model, arena, sizeof arena) != EM_OK) return 1;
    if ({p}_run(&model, code, out) != EM_OK) return 2;
    const {p}_output_t kept = out[0] = 77;
    code[0] = 5;
    if ({p}_run(&model, code, out) != EM_ERROR_RANGE || out[0] != kept) return 3;
    if ({p}_quantize_input(&good, code) != EM_OK || code[0] != 4) return 4;
    if ({p}_quantize_input(&over, code) != EM_ERROR_RANGE) return 5;
    if ({p}_quantize_input(&far, code) != EM_ERROR_RANGE) return 6;
    if ({p}_quantize_input(&under, code) != EM_ERROR_RANGE) return 7;
    if ({p}_quantize_input(&between, code) != EM_ERROR_RANGE) return 8;
    return 0;
}}
"""


def test_an_index_beyond_the_table_is_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = edgemat.quantize(nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)), edgemat.Recipe(weights="ternary"))
    x = torch.arange(5)
    edgemat.calibrate(q, [x])
    edgemat.to_onnx(q, (x,), tmp_path / "net.onnx")
    graph = read(tmp_path / "net.onnx")
    prefix = project(graph).prefix
    folder = export(graph, tmp_path / "net")
    (folder / "index.c").write_text(PROGRAM.format(p=prefix, u=prefix.upper()))
    sources = [folder / file for file in ("index.c", "model.c", "kernels.c", "weights.c")]
    program = toolchain.compile(toolchain.find_c(), sources, folder / "index", standard="c99")
    assert subprocess.run([str(program)], check=False).returncode == 0
