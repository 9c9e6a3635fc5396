"""Functions that generated model files bring along: ONNX's recurrent layers by PyTorch's."""

HELPERS = {
    "lstm": '''def lstm(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ONNX's LSTM, whose gates are in the order input, output, forget, cell."""
    hidden = r.shape[2]
    weights = []
    for way in range(w.shape[0]):
        for part in (w[way], r[way], b[way, : 4 * hidden], b[way, 4 * hidden :]):
            i, o, f, g = part.chunk(4)
            weights.append(torch.cat((i, f, g, o)))
    two = w.shape[0] == 2
    y, h, c = torch.lstm(x, (h, c), weights, True, 1, 0.0, True, two, False)
    return y.unflatten(2, (w.shape[0], hidden)).transpose(1, 2), h, c''',
    "gru": '''def gru(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """ONNX's GRU, whose gates are in the order update, reset, hidden."""
    hidden = r.shape[2]
    weights = []
    for way in range(w.shape[0]):
        for part in (w[way], r[way], b[way, : 3 * hidden], b[way, 3 * hidden :]):
            update, reset, new = part.chunk(3)
            weights.append(torch.cat((reset, update, new)))
    two = w.shape[0] == 2
    y, h = torch.gru(x, h, weights, True, 1, 0.0, True, two, False)
    return y.unflatten(2, (w.shape[0], hidden)).transpose(1, 2), h''',
    "rnn": '''def rnn(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """ONNX's RNN."""
    hidden = r.shape[2]
    weights = []
    for way in range(w.shape[0]):
        weights += [w[way], r[way], b[way, :hidden], b[way, hidden:]]
    two = w.shape[0] == 2
    y, h = torch.rnn_tanh(x, h, weights, True, 1, 0.0, True, two, False)
    return y.unflatten(2, (w.shape[0], hidden)).transpose(1, 2), h''',
}
