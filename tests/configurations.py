"""Options of `GPTConfig` that several tests share."""

LLAMA = {"norm": "rmsnorm", "positions": "rotary", "feed_forward": "swiglu", "bias": False, "qkv_bias": False}
