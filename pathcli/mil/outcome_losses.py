"""What MIL for outcomes minimises: pure functions of tensors, each beside its source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

if TYPE_CHECKING:
    from torch import Tensor


def cox_log_likelihood(risks: Tensor, times: Tensor, events: Tensor, *, efron: bool) -> Tensor:
    """Return the log partial likelihood (Cox 1972) of log risks [n], times [n], events bool [n].

    The risk set of an event is who of these n has a time of at least its own. Events at one
    time are taken as Breslow 1974 does, each with the whole risk set, or as Efron 1977, where
    those who have had the event are gone by equal shares. 0 without events.
    """
    order = times.argsort(descending=True, stable=True)
    risks, times, events = risks[order], times[order], events[order]
    _, group, sizes = torch.unique_consecutive(times, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0) - 1
    at_risk = risks.logcumsumexp(0)[last][group]  # of each row: all of its time or later
    if not efron:
        return ((risks - at_risk) * events).sum()
    found = (risks * events).sum()
    for g in torch.unique(group[events]).tolist():
        tied = risks[(group == g) & events]
        whole = at_risk[group == g][0]
        share = torch.arange(len(tied)).to(risks) / len(tied)
        gone = share * (tied.logsumexp(0) - whole).exp()
        found = found - (whole + torch.log1p(-gone)).sum()
    return found


def hazards_nll(logits: Tensor, bins: Tensor, events: Tensor, *, alpha: float) -> Tensor:
    """Return the mean negative log likelihood of discrete hazards, the sigmoids of logits [n, k].

    Zadeh and Schmid 2020, as used for slides since MCAT (Chen et al., ICCV 2021): an event in
    bin y is survival of the bins before and the hazard of y, a censoring in bin y is survival
    through y. Censored patients weigh 1 - `alpha`.

    Args:
        logits: [n, k].
        bins: int64 [n], the bin of each time.
        events: bool [n].
        alpha: 0..1; 0 is the likelihood itself.
    """
    stays = F.logsigmoid(-logits)  # log(1 - hazard)
    places = torch.arange(logits.shape[1], device=logits.device)
    before = (stays * (places < bins[:, None])).sum(1)
    rows = torch.arange(len(logits), device=logits.device)
    of_event = before + F.logsigmoid(logits)[rows, bins]
    of_censored = (1 - alpha) * (before + stays[rows, bins])
    return -torch.where(events, of_event, of_censored).mean()
