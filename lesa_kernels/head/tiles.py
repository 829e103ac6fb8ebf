"""How tokens, channels and outputs are cut for the Triton kernel; decided without Triton."""

MAX_FEATURES = 16
MAX_OUTPUTS = 512
