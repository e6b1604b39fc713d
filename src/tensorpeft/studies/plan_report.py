"""The table of ``tensorpeft plan``, and its JSON."""

from pathlib import Path
from typing import Any

from peft import PeftType
from rich.console import Console

from tensorpeft import print_tensor_map
from tensorpeft.reports.files import write_json
from tensorpeft.reports.tables import Table
from tensorpeft.reports.terminal import print_table
from tensorpeft.studies.plan import MethodPlan, ModelPlan, build_skeleton, plan_model

# Of a GPU's memory, what CUDA's context and the allocator's gaps may take.
_HEADROOM = 0.08


def run_plan(
    name: str,
    gpu: int | None = None,  # bytes
    json_file: Path | None = None,
    with_maps: bool = False,
    **arguments: Any,  # of `plan_model`
) -> ModelPlan:
    """The plan, after printing its table (and maps) and writing its figures."""
    console = Console()
    with console.status("Planning") as status:
        plan = plan_model(name, on_method=lambda method: status.update(f"Planned {method}"), **arguments)
    print_table(console, plan_table(plan, gpu))
    if with_maps:
        model = build_skeleton(name)
        for planned in plan.methods:
            if planned.problem:
                continue
            config = planned.config(arguments.get("targets"))
            if config.peft_type != PeftType.LORA:
                print()
                print_tensor_map(model, config)  # type: ignore[arg-type]
    if json_file is not None:
        write_json(json_file, to_tree(plan))
    return plan


def plan_table(plan: ModelPlan, gpu: int | None = None) -> Table:
    """A row per method; with a GPU's bytes also which base it fits beside."""
    step = f"a step of {plan.batch} x {plan.length} tokens{', checkpointed' if plan.gradient_checkpointing else ''}"
    on = [f"on\n{form}" for form in plan.base_bytes]
    headers = ["method", "size", "trained", "% of\nbase", "file,\nMB", "step,\nGiB", *on, "FLOPs,\n× LoRA"]
    headers += [] if gpu is None else ["fits"]
    rows = [_cells(plan, method, gpu) for method in plan.methods if not method.problem]
    title = f"{plan.name}: {plan.num_parameters:,} parameters; {step}"
    return Table(title, headers, rows, legend(plan, gpu))


def _cells(plan: ModelPlan, method: MethodPlan, gpu: int | None) -> list[str]:
    totals = _totals(plan, method)
    fits = [form for form, total in totals.items() if gpu is not None and total <= (1 - _HEADROOM) * gpu]
    fit = "both" if len(fits) == len(plan.base_bytes) else ", ".join(fits) or "no"
    return [
        method.method.label,
        f"{method.knob}={method.value}" if method.knob else "",
        f"{method.trained:,}",
        f"{method.trained / plan.num_parameters:.3%}".rstrip("%"),
        f"{method.saved / 1e6:.2f}",
        f"{method.step.peak_bytes / 2**30:.2f}",
        *(f"{totals[form] / 2**30:.2f}" if form in totals else "–" for form in plan.base_bytes),
        f"{method.flops_ratio:.2f}",
        *([] if gpu is None else [fit]),
    ]


def _totals(plan: ModelPlan, method: MethodPlan) -> dict[str, int]:
    """The memory of training by the base's form; a method that quantises its base has that one alone."""
    forms = plan.base_bytes if method.method.quantize is None else ["NF4"]
    return {form: method.total(plan.base_bytes[form]) for form in forms}


def legend(plan: ModelPlan, gpu: int | None = None) -> list[str]:
    """What the columns mean, and what could not be planned."""
    lines = [
        "step: the most that a forward and backward allocate. on bf16, on NF4: the memory of training: the base's "
        "weights in that form (NF4: the linear layers but the head), adapter, gradients, AdamW's moments, and step. "
        "FLOPs: of a step.",
    ]
    if starts := [f"{method.method.label} {method.start / 2**20:,.0f} MiB" for method in plan.methods if method.start]:
        lines.append(f"A start from gradients holds sketches, before there are moments: {', '.join(starts)}.")
    if gpu is not None:
        lines.append(f"fits: into {gpu / 2**30:g} GiB, {_HEADROOM:.0%} of which are left for CUDA and the allocator.")
    return lines + [
        f"{method.method.label}: not on this model. {method.problem}" for method in plan.methods if method.problem
    ]


def to_tree(plan: ModelPlan) -> dict[str, Any]:
    """All figures; bytes throughout."""
    return {
        "model": plan.name,
        "parameters": plan.num_parameters,
        "base_bytes": plan.base_bytes,
        "batch": plan.batch,
        "length": plan.length,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "methods": {
            method.method.key: {"problem": method.problem}
            if method.problem
            else {
                **({method.knob: method.value} if method.knob else {}),
                "trained_parameters": method.trained,
                "file_bytes": method.saved,
                "start_bytes": method.start,
                "step_bytes": method.step.peak_bytes,
                "step_flops": method.step.flops,
                "flops_to_lora": method.flops_ratio,
                "training_bytes": _totals(plan, method),
            }
            for method in plan.methods
        },
    }
