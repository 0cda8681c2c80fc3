"""Names of timm.list_models(): each gives an encoder with values that trains, or is refused by name.

benchmarks/encoders.py goes through the whole list.
"""

from __future__ import annotations

import pytest
import timm
import torch

from hpc_supcon.errors import ConfigError
from hpc_supcon.models import build_encoder

# the fastest of each family
NAMES = [
    "beit_base_patch16_224", "botnet26t_256", "coat_lite_tiny", "coatnet_pico_rw_224", "convit_tiny",
    "convmixer_1536_20", "convnext_zepto_rms", "cpubone_nano", "cspnext_tiny", "darknet17", "davit_tiny",
    "deit_base_patch16_384", "dla34", "dpn48b", "eca_resnext26ts", "edgenext_small", "efficientvim_m1",
    "efficientvit_b0", "ese_vovnet19b_slim", "eva02_small_patch14_336", "fasternet_t2", "gcvit_xxtiny",
    "ghostnet_050", "hardcorenas_a", "hgnet_tiny", "hiera_tiny_224", "inception_next_atto", "lcnetv2_small",
    "legacy_seresnet18", "legacy_xception", "levit_384_s8", "lowformer_e1", "mambaout_femto", "mixer_s16_224",
    "mobilenetv4_conv_small", "mobilevitv2_100", "nf_resnet26", "pit_ti_224", "poolformer_s12", "pvt_v2_b0",
    "qwen3_vit_88m", "rdnet_tiny", "regnetx_002", "resnest14d", "resnet10t", "resnetv2_18d", "rexnet_100",
    "skresnet18", "starnet_s050", "swiftformer_xs", "swin_s3_tiny_224", "test_efficientnet_evos", "test_vit",
    "vgg11", "visformer_small", "vit_srelpos_small_patch16_224", "vit_tiny_r_s16_p8_224", "xception41p",
]  # fmt: skip
REFUSED = {
    "qwen3_vit_88m_enc": "it returns no feature vectors",
    "crossvit_9_240": "it needs 240: set model.input_size=240",
}


def test_the_names_are_timms():
    assert {*NAMES, *REFUSED} <= set(timm.list_models())
    assert len(NAMES) + len(REFUSED) == 60


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_features_of_the_size_that_it_tells(name):
    with torch.device("meta"):
        encoder = build_encoder(name, image_size=32)
        assert encoder(torch.empty(2, 3, 32, 32)).shape == (2, encoder.feature_dim)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name(name):
    with torch.device("meta"), pytest.raises(ConfigError, match=f"model.encoder={name} .*{REFUSED[name]}"):
        build_encoder(name, image_size=32)


@pytest.mark.parametrize("name", ["coat_tiny", "coat_small"])
def test_an_encoder_with_one_module_in_two_places_keeps_its_values_and_trains(name):
    encoder = build_encoder(name, image_size=32)
    assert len(encoder.state_dict()) > len(list(encoder.named_parameters()))  # what is special about it
    assert not [key for key, tensor in encoder.state_dict().items() if tensor.is_meta]
    encoder(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in encoder.cpe1.parameters())
