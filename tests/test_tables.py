from p2bw.tables import curve, summarise_modules


def test_runs_of_layers_are_joined() -> None:
    assert summarise_modules(["wte", "h.0", "h.1", "h.2", "ln_f"]) == "wte, h.0-2, ln_f"
    assert summarise_modules(["h.7", "h.9"]) == "h.7, h.9"
    assert summarise_modules(["0", "1", "2"]) == "0-2"


def test_what_is_left_of_a_cut_layer_is_said_once() -> None:
    modules = ["h.0", "h.1.ln_1", "h.1.attn.qkv", "h.1.mlp (part)"]
    assert summarise_modules(modules) == "h.0, part of h.1"
    assert summarise_modules(["model.layers.3.mlp", "model.norm"]) == (
        "part of model.layers.3, model.norm"
    )
    assert summarise_modules(["h.4 (part)", "loss"]) == "part of h.4, loss"


def test_a_curve_falls_with_its_values() -> None:
    line = curve([float(value) for value in range(120, 0, -1)])
    assert line[0] == "█"
    assert line[-1] == "▁"
    assert curve([1.0, 1.0]) == "▁▁"
    assert curve([3.0, 1.0, 2.0]) == "█▁▅"
    assert curve([float("nan")]) == ""
