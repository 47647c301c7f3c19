"""Peak memory of one dilated forward above its inputs; run in a process of its own.

Arguments: sequence length, w0, dtype, causal (0 or 1). Prints one line of JSON.
"""

import json
import sys

import torch
from dilated_core import dilated_attention
from equal_flops import DTYPES, HEAD_DIM, NUM_HEADS, geometric_pattern
from harness import high_water_bytes, reset_high_water

if __name__ == "__main__":
    seq_len, w0, dtype, is_causal = sys.argv[1:]
    pattern = geometric_pattern(int(w0))
    tiny = torch.zeros(1, 256, NUM_HEADS, HEAD_DIM, dtype=DTYPES[dtype])
    shape = (1, int(seq_len), NUM_HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape).to(DTYPES[dtype]) for _ in range(3))
    with torch.no_grad():
        # Loads kernels and starts threads, whose memory is not the attention's.
        dilated_attention(tiny, tiny, tiny, pattern)
        reset_high_water()
        before = high_water_bytes()
        out = dilated_attention(q, k, v, pattern, is_causal=is_causal == "1")
        above_inputs = high_water_bytes() - before
    print(
        json.dumps(
            {
                "bytes_above_inputs": above_inputs,
                "output_bytes": out.nbytes,
                "ratio": round(above_inputs / out.nbytes, 2),
            }
        )
    )
