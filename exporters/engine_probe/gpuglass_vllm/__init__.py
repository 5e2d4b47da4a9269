"""What GPUGlass loads inside vLLM: hooks that tell the agent on this node who asks, who runs, for how long.

Nothing here may fail, slow down or change the process that it is loaded into. `gpuglass_vllm.plugin` is the
entry, `gpuglass_vllm.records` the wire format, which the agent imports as well.
"""

__version__ = "0.1.0"
