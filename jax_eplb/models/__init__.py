"""Decoders built from the MoE layer."""

from jax_eplb.models.config import DecoderConfig as DecoderConfig
from jax_eplb.models.decoder import Cache as Cache
from jax_eplb.models.decoder import DecoderParams as DecoderParams
from jax_eplb.models.decoder import decode as decode
