"""CTC with all logits in memory, as the page on CTC writes it: what `regularised_ctc` is measured against."""
import math

import torch
import torch.nn.functional as F

from prosody_ser.backbones import frame_mask
from prosody_ser.config import CTC_DEFAULTS
from prosody_ser.ctc import infeasible


def dense_ctc(hidden, weight, bias, *labels, blank=4, **options):
    "The terms, the weighted loss and the values to watch, in float32 or wider whatever the autocast"
    dtype = torch.promote_types(torch.float32, hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        head = [x.to(dtype) for x in (hidden, weight, bias)]
        return dense_terms(*head, *labels, blank, CTC_DEFAULTS | options)


def dense_terms(hidden, weight, bias, frame_lengths, targets, target_lengths, blank, o):
    "hidden (B, T, H), weight (V, H), bias (V,), frame_lengths (B,), targets (B, L), target_lengths (B,)"
    mask, V = frame_mask(frame_lengths, hidden.shape[1]), len(weight)       # (B, T)
    logits = F.linear(hidden.masked_fill(~mask[..., None], 0), weight, bias)
    logp = logits.log_softmax(-1)                                           # (B, T, V)
    p, tau = logp.exp(), o["blank_threshold"]
    lengths = frame_lengths, target_lengths
    nll = F.ctc_loss(logp.transpose(0, 1), targets, *lengths, blank, "none", zero_infinity=True)  # (B,)
    B, tokens = len(nll), target_lengths.clamp(min=1)
    size = {"mean": tokens, "mean_frames": frame_lengths, "mean_batch": 1, "sum": 1 / B}[o["reduction"]]
    entropy, p_blank = -(p * logp).sum(-1)[mask], p[..., blank]             # (N,) of the valid frames, (B, T)
    emits = p_blank[mask] < 0.5                                             # (N,)
    mean_blank = (p_blank * mask).sum(1) / frame_lengths                    # (B,)
    terms = {
        "ctc": (nll / size).mean(),
        "entropy": -entropy.mean() / math.log(V),
        "blank_penalty": ((mean_blank - tau) / (1 - tau)).relu().square().mean(),
        "label_smoothing": (-math.log(V) - logp.mean(-1)[mask]).mean(),
        "confidence": -(entropy * emits).sum() / emits.sum().clamp(min=1)}
    weights = {"ctc": 1, "entropy": o["entropy_weight"], "blank_penalty": o["blank_penalty"],
               "label_smoothing": o["label_smoothing"], "confidence": o["confidence_penalty"]}
    loss = sum(w * terms[name] for name, w in weights.items() if w)
    watch = {"blank": p_blank[mask].mean(), "nats": nll.sum() / (tokens * (nll > 0)).sum(),
             "infeasible": infeasible(frame_lengths, targets, target_lengths).sum()}
    return {"loss": loss} | {name: value.detach() for name, value in (terms | watch).items()}
