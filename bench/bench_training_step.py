"""A whole training step (forward, backward, optimizer) of an 84 M-parameter Llama shape, 4 x 256 tokens, bf16, rank 16.

"frozen base" is forward + backward to the inputs with no adapter: no adapter can be faster with that base. One row for
LoRA, one for QLoRA and one for (IA)³, each beside PEFT's.
"""

from .models import BATCH, LAYERS, MODELS, TOKENS, training_step


def run(suite) -> None:
    layers = 2 if suite.quick else LAYERS
    absent = set(suite.document["absent_peers"])
    steps = {
        name: training_step(build(layers))
        for name, (build, needs) in MODELS.items()
        if not absent.intersection(needs) and not (suite.quick and name == "full fine-tuning")
    }

    def check():
        # one batch, one random base: what adapters start from is the base itself, so the losses agree
        losses = {name: step() for name, step in steps.items() if name.startswith(("LoRA", "(IA)³", "frozen"))}
        low, high = min(losses.values()), max(losses.values())
        assert high - low <= 0.02 * high, f"first losses differ: {losses}"

    for method in ("LoRA", "QLoRA", "(IA)³"):
        ours = f"{method}, ours"
        others = [name for name in steps if name != ours and name.partition(",")[0] in (method, name)]
        candidates = {ours: steps[ours], **{name: steps[name] for name in others}}
        result = suite.compare(
            f"{method} step, {layers} layers, {BATCH}x{TOKENS} tokens", candidates,
            check=check if method == "LoRA" else None, layers=layers,
        )  # fmt: skip
        if result is not None:
            seconds = result["seconds"]
            result["cost_over_base"] = {n: s / seconds["frozen base"] - 1 for n, s in seconds.items()}
            print(
                "    over the frozen base: "
                + ", ".join(f"{name} {cost:+.0%}" for name, cost in result["cost_over_base"].items())
            )
