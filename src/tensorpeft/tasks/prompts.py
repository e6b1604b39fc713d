"""The instruction template of Stanford Alpaca, which LLM-Adapters, MetaMathQA and most instruction data use."""

_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def instruction_prompt(instruction: str, context: str = "") -> str:
    """The prompt of an instruction, up to and including "### Response:" and its line end."""
    if context.strip():
        return _WITH_INPUT.format(instruction=instruction, input=context)
    return _WITHOUT_INPUT.format(instruction=instruction)
