"""Compiles every Triton kernel for Hopper (sm_90) without a GPU and prints one JSON line per kernel.

    python tests/compile_kernels.py

A line has registers and stack bytes per thread (a stack means spilled registers), shared memory per program, and
whether the kernel uses Hopper's own instructions: wgmma on the tensor cores, TMA copies.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from ops import attention, head, sample

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
F, B, I = "*fp32", "*bf16", "*i64"
ROW = dict(V="i32", stride="i32", temperature="fp32")
ATTEND = dict(Q=B, KEYS=B, VALUES=B, LENGTH=I, OUT=F, LSE=F, scale="fp32", q_stride="i32", slot_stride="i64",
              SPLITS="i32")  # fmt: skip
TILE = head.TILE
SCORE = dict(HIDDEN="tensordesc<bf16[{TOKENS},{DEPTH}]>".format(**TILE),
             WEIGHT="tensordesc<bf16[{WORDS},{DEPTH}]>".format(**TILE), Y=I, MAX=F, SUM=F, SUM_Z=F,
             TARGET=F, N="i32", H="i32", V="i32", inverse_temperature="fp32")  # fmt: skip
ROPE = dict(QKV=B, COS=F, SIN=F, NORMS=B, KV=B, CELLS=I, HEADS="i32", KV_HEADS="i32", eps="fp32")
GRAD = dict(Z=F, Y=I, LSE=F, ENTROPY=F, G_LOGP=F, G_ENTROPY=F, D=B, V="i32", z_stride="i32", d_stride="i32",
            temperature="fp32")  # fmt: skip
SAMPLE = dict(Z=F, U="*fp64", TOKEN=I, LOGP=F, **ROW, top_p="fp32")

HALF, FULL = attention.BLOCKS[2], attention.BLOCKS[4]  # for bf16 and fp32
KERNELS = [  # kernel, types of its arguments, constants, warps, pipeline stages: as launched, for Qwen2.5-3B and others
    (head.row_stats_kernel, dict(Z=F, Y=I, LOGP=F, ENTROPY=F, LSE=F, **ROW), dict(BLOCK=4096), 8, 3),
    (head.row_gradients_kernel, GRAD, dict(BLOCK=4096), 8, 3),
    (head.score_kernel, SCORE, dict(**TILE, UPCAST=False), 8, 4),
    *((sample.sample_tokens_kernel, SAMPLE, dict(GREEDY=g, NUCLEUS=p, BLOCK=2048), 8, 3)
      for g, p in ((False, False), (False, True), (True, False))),
    *((attention.rope_and_store_kernel, ROPE, dict(D=128, BLOCK=64, NORM=norm), 1, 3) for norm in (False, True)),
    (attention.swiglu_kernel, dict(GATE_UP=B, OUT=B, width="i32"), dict(BLOCK=1024), 4, 3),
    *((attention.attend_kernel, ATTEND, dict(KV_HEADS=n, G=g, ROWS=16, D=d, WIDTH=w, BLOCK=HALF["BLOCK"], UPCAST=False),
       HALF["num_warps"], 3)
      for n, g, d, w in ((2, 8, 128, 128), (8, 3, 128, 128), (8, 4, 64, 64), (2, 7, 80, 128))),
    (attention.attend_kernel, ATTEND | dict(OUT=B),  # one split: the result in bf16
     dict(KV_HEADS=2, G=8, ROWS=16, D=128, WIDTH=128, BLOCK=HALF["BLOCK"], UPCAST=False), HALF["num_warps"], 3),
    (attention.attend_kernel, ATTEND | dict(Q=F, KEYS=F, VALUES=F),  # --dtype float32 on a GPU
     dict(KV_HEADS=2, G=8, ROWS=16, D=128, WIDTH=128, BLOCK=FULL["BLOCK"], UPCAST=False), FULL["num_warps"], 3),
    *((attention.attend_merge_kernel, dict(PARTS=F, LSE=F, OUT=B, SPLITS="i32"),
       dict(D=128, WIDTH=128, PADDED_SPLITS=n), 4, 3) for n in (1, 8, 64)),
]  # fmt: skip


def compiled(kernel, types: dict[str, str], constants: dict, warps: int, stages: int) -> dict:
    """Compiles one kernel. Pointers and strides are multiples of 16, like torch's."""
    names = [p.name for p in kernel.params]
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, t in types.items() if t[0] == "*" or "stride" in n}
    signature = {n: types.get(n, "constexpr") for n in names}
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, aligned)
    options = dict(num_warps=warps, num_stages=stages)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary.asm["cubin"])
        usage = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = binary.asm["ptx"]
    return dict(
        kernel=kernel.__name__, **constants, registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]), shared=binary.metadata.shared, wgmma="wgmma" in ptx,
        tma="cp.async.bulk.tensor" in ptx,
    )  # fmt: skip


if __name__ == "__main__":
    for kernel in KERNELS:
        print(json.dumps(compiled(*kernel)), flush=True)
