"""Weights into a masked autoencoder: the encoder of any file, the decoder of those that have one."""

from dataclasses import dataclass, replace

from torch import Tensor

from fcmae.checkpoints.layouts import has_mask_token
from fcmae.checkpoints.load_into import AdaptChannels, LoadReport, load_into
from fcmae.checkpoints.names import STEM
from fcmae.checkpoints.weights import Weights
from fcmae.errors import UserError
from fcmae.models.fcmae import FCMAE


@dataclass(frozen=True, kw_only=True)
class AutoencoderReport:
    """What became of a model's parameters.

    Attributes:
        encoder: of its network.
        decoder: tensors of the decoder that hold the file's weights now; 0: it is as it was.
        why_fresh: why that is so, in words; empty if it is not.
    """

    encoder: LoadReport
    decoder: int
    why_fresh: str

    def lines(self) -> list[str]:
        """The same for people, one line per part."""
        fresh = f"new, {self.why_fresh}"
        lines = [*self.encoder.body_lines(), f"decoder: {fresh if self.why_fresh else f'{self.decoder} tensors'}"]
        if self.encoder.source.layout == "minkowski":
            lines.append(
                "the authors' code took GRN's norms over the whole batch: model.grn_scope=batch goes on so, the "
                "default takes them per image"
            )
        return lines


def load_autoencoder(
    model: FCMAE, weights: Weights, *, adapt_in_chans: AdaptChannels | None = None, strict: bool = True
) -> AutoencoderReport:
    """Loads an encoder, without its final norm and classifier, and the decoder if the file has one.

    Where the file's decoder or the model's is somebody's own, and they are not the same, the model's stays as it is.

    Args:
        model: to load into. On torch's meta device nothing is loaded, but all is checked.
        weights: of `read_weights`.
        adapt_in_chans: as for `load_into`; another number of channels takes a new decoder.
        strict: refuse an encoder or a decoder that does not fit; else what does not fit stays as it is.

    Raises:
        UserError: as `load_into`; a decoder of another depth or width. The model is as it was.
    """
    ours = weights.layout == "fcmae"  # then the final norm is as it was made
    body = {name: value for name, value in weights.weights.items() if ours or not name.startswith("head.")}
    own, given = model.decoder.state_dict(), weights.decoder
    why_fresh = "" if given else "the file has none"
    misfit = _misfit(given, own)
    other_channels = weights.weights[STEM].shape[1] != model.encoder.in_chans  # whether they may be, load_into says
    if given and misfit:
        if strict and not other_channels and has_mask_token(given) and has_mask_token(own):
            raise UserError(
                f"{weights.file} has a decoder that the model's differs from ({misfit}): set model.decoder_dim and "
                "model.decoder_depth as it has them, or strict=false for a new decoder"
            )
        why_fresh = f"the file's does not fit ({misfit})"
    headless = replace(weights, weights=body)
    report = load_into(model.encoder.net, headless, adapt_in_chans=adapt_in_chans, keep_head=False, strict=strict)
    if not why_fresh and not any(value.is_meta for value in own.values()):
        model.decoder.load_state_dict(dict(given))
    return AutoencoderReport(encoder=report, decoder=0 if why_fresh else len(given), why_fresh=why_fresh)


def _misfit(given: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What keeps the weights of one decoder from being those of the other; empty if nothing does."""
    if not given:
        return ""
    if lacking := sorted(own.keys() - given.keys()):
        return f"it lacks {lacking[0]}"
    if left_over := sorted(given.keys() - own.keys()):
        return f"it has {left_over[0]}"
    for name, value in own.items():
        if value.shape != given[name].shape:
            return f"{name} is {tuple(given[name].shape)}, here {tuple(value.shape)}"
    return ""
