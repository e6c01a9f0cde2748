"""The catalogue: every network has its count, and every architecture of docs/networks.md a network."""

import dataclasses

import pytest

from jaxrl import networks
from jaxrl.nets import presets

COUNTS = {  # ours; as published by the paper, the authors or the page of the files, or why there is no such number
    "smollm2_135m": (134_515_008, "135M"),
    "llama2_7b": (6_738_415_616, "6.7B"),
    "llama2_13b": (13_015_864_320, "13.0B"),
    "llama2_70b": (68_976_648_192, "69.0B"),
    "mistral_7b": (7_241_732_096, "7.24B"),
    "llama31_8b": (8_030_261_248, "8.03B"),
    "llama31_70b": (70_553_706_496, "70.6B"),
    "llama32_1b": (1_235_814_400, "1.24B"),
    "qwen25_0_5b": (494_032_768, "0.49B"),
    "qwen25_1_5b": (1_543_714_304, "1.54B"),
    "qwen25_7b": (7_615_616_512, "7.62B"),
    "qwen25_3b": (3_085_938_688, "3.09B"),
    "qwen25_14b": (14_770_033_664, "14.8B"),
    "qwen25_32b": (32_763_876_352, "32.8B"),
    "qwen25_72b": (72_706_203_648, "72.7B"),
    "qwen3_0_6b": (596_049_920, "0.6B"),
    "qwen3_1_7b": (1_720_574_976, "1.7B"),
    "qwen3_4b": (4_022_468_096, "4.0B"),
    "qwen3_8b": (8_190_735_360, "8.2B"),
    "qwen3_14b": (14_768_307_200, "14.8B"),
    "qwen3_32b": (32_762_123_264, "32.8B"),
    "deepseek_llm_7b": (6_910_365_696, "7B"),
    "deepseek_llm_67b": (67_425_001_472, "67B"),
    "llada_8b": (8_015_581_184, "8.02B"),
    "bd3lm_small": (162_265_682, "", "the paper's 110M are without the two tables of tokens"),
    "mixtral_8x7b": (46_702_792_704, "46.7B"),
    "mixtral_8x22b": (140_620_634_112, "141B"),
    "qwen15_moe_a2_7b": (14_315_784_192, "14.3B"),
    "qwen3_30b_a3b": (30_532_122_624, "30.5B"),
    "qwen3_235b_a22b": (235_093_634_560, "235B"),
    "deepseek_v2_lite": (15_706_484_224, "15.7B"),
    "deepseek_v2": (235_741_434_880, "236B"),
    "deepseek_v3": (671_026_419_200, "671B"),
    "moonlight_16b_a3b": (15_960_110_208, "16B"),
    "linear_transformer_mnist": (
        6_650_368,
        "",
        "none published; 256 classes where the paper has a mixture of logistics",
    ),
    "performer_protein": (80_518_144, "", "none published"),
    "transnormer_t1": (44_916_224, "", "sizes of our own"),
    "transnormer_t2": (44_914_688, "", "sizes of our own"),
    "retnet_1_3b": (1_009_002_496, "", "the paper's values are twice as wide, see its test"),
    "minimax_text_01": (456_089_655_296, "456B"),
    "sparse_transformer_enwik8": (101_126_144, "", "the paper's 95M have two small tables of positions, see its test"),
    "gpt2": (124_439_808, "124M"),
    "gpt2_medium": (354_823_168, "355M"),
    "gpt2_large": (774_030_080, "774M"),
    "gpt2_xl": (1_557_611_200, "1558M"),
    "distilgpt2": (81_912_576, "82M"),
    "chameleon_7b": (7_013_666_816, "7B"),
    "chameleon_34b": (34_294_308_864, "34B"),
    "deepseek_v3_mtp": (682_636_487_424, "", "as files hold it: 685B, embedding and head twice; see its test"),
    "bert_base": (110_106_428, "110M"),
    "bert_large": (336_226_108, "336M"),
    "bert_base_cased": (108_932_934, "109M"),
    "bert_base_multilingual": (178_566_653, "179M"),
    "bert_tiny": (4_433_468, "4.4M"),
    "bert_mini": (11_267_900, "11.3M"),
    "bert_small": (29_058_876, "29.1M"),
    "bert_medium": (41_668_412, "41.7M"),
    "minilm_l6": (22_713_216, "22.7M"),
    "roberta_base": (124_697_433, "125M"),
    "roberta_large": (355_412_057, "355M"),
    "distilroberta": (82_170_201, "82M"),
    "xlm_roberta_base": (278_295_186, "278M"),
    "xlm_roberta_large": (560_142_482, "560M"),
    "distilbert": (66_985_530, "67M"),
    "albert_base": (11_813_810, "12M"),
    "albert_large": (17_847_474, "18M"),
    "albert_xlarge": (59_021_490, "", "the paper says 60M, and counts no head"),
    "albert_xxlarge": (223_158_450, "", "the paper says 235M, of version 1 and no such file"),
    "electra_small": (13_549_057, "14M"),
    "electra_base": (109_483_009, "", "the paper's 110M, rounded up"),
    "electra_large": (335_142_913, "335M"),
    "electra_small_generator": (4_620_026, "", "none published"),
    "electra_base_generator": (33_740_602, "", "none published"),
    "electra_large_generator": (51_295_290, "", "none published"),
    "bigbird_base": (127_468_800, "127M"),
    "longformer_base": (127_398_144, "", "149M with the matrices of the first token, see its test"),
    "zaremba_medium": (19_770_400, "20M"),
    "zaremba_large": (66_024_000, "66M"),
    "rnn_medium": (14_692_600, "", "sizes of our own"),
    "gru_medium": (18_077_800, "", "sizes of our own"),
    "qwen2_vl_2b": (2_208_985_600, "2.21B"),
    "qwen2_vl_7b": (8_291_375_616, "8.29B"),
    "qwen2_vl_72b": (73_405_560_320, "73.4B"),
    "qwen25_vl_3b": (3_754_622_976, "3.75B"),
    "qwen25_vl_7b": (8_292_166_656, "8.29B"),
    "qwen25_vl_32b": (33_452_718_336, "33.5B"),
    "qwen25_vl_72b": (73_410_777_344, "73.4B"),
    "kimi_vl_a3b": (16_407_656_048, "16.4B"),
    "ui_tars_2b": (2_208_985_600, "2.21B"),
    "ui_tars_7b": (8_291_375_616, "8.29B"),
    "ui_tars_72b": (73_405_560_320, "73.4B"),
    "ui_tars_15_7b": (8_292_166_656, "8.29B"),
    "vit_ti16": (5_717_416, "5.7M"),
    "vit_s16": (22_050_664, "22M"),
    "vit_s32": (22_878_952, "22.9M"),
    "vit_b16": (86_567_656, "86.6M"),
    "vit_b32": (88_224_232, "88.2M"),
    "vit_l16": (304_326_632, "304M"),
    "vit_l32": (306_535_400, "307M"),
    "vit_h14": (632_045_800, "632M"),
    "swin_t": (28_288_354, "28M"),
    "swin_s": (49_606_258, "50M"),
    "swin_b": (87_768_224, "88M"),
    "swin_l": (196_532_476, "197M"),
    "swin_b_384": (87_903_584, "88M"),
    "swin_l_384": (196_735_516, "197M"),
    "swinv2_t": (28_347_154, "28M"),
    "swinv2_s": (49_728_418, "50M"),
    "swinv2_b": (87_918_816, "88M"),
    "swinv2_t_w16": (28_347_154, "28M"),
    "swinv2_s_w16": (49_728_418, "50M"),
    "swinv2_b_w16": (87_918_816, "88M"),
    "swinv2_l_w12": (228_772_549, "229M"),
    "swinv2_l_w24_384": (196_739_932, "197M"),
    "sam_vit_b": (93_735_728, "93.7M"),
    "sam_vit_l": (312_343_088, "312M"),
    "sam_vit_h": (641_090_864, "641M"),
    "vq_chameleon": (68_718_467, "", "none published"),
    "fvsbn_mnist": (615_440, "", "none published: n^2 + n, of which n (n + 1) / 2 are used"),
    "nade_mnist": (785_284, "", "none published: 2 n h + n + h"),
    "nade_mnist_2": (1_427_784, "", "none published: as made_mnist_2, and which inputs are given"),
    "made_mnist_1": (785_284, "", "none published: 2 n h + n + h, masked ones too"),
    "made_mnist_2": (1_035_784, "", "none published: masked ones too"),
    "pixelcnn_digits": (23_857, "", "sizes of our own"),
    "pixelcnn_mnist": (137_249, "", "sizes of our own"),
}


def published(text):
    """(number, half a unit of its last digit), in parameters."""
    digits, unit = text[:-1], {"M": 1e6, "B": 1e9}[text[-1]]
    return float(digits) * unit, unit * 0.5 * 10.0 ** -len(digits.partition(".")[2])


def test_every_network_has_a_count_that_was_published_or_a_reason():
    assert {one.name for one in networks.networks()} == set(COUNTS)
    for name, (count, said, *why) in COUNTS.items():
        assert bool(said) != bool(why), name
        if said:
            number, half = published(said)
            assert abs(count - number) <= half * 1.0001, (name, count, said)


@pytest.mark.slow
def test_every_network_has_its_count():
    for one in networks.networks():
        assert one.parameters == COUNTS[one.name][0], one.name


def count(name):
    return networks.find(name).parameters


def test_differences_from_what_was_published_have_their_reasons():
    # tables of 96 and 128 rows in the place of one of 12,288
    sparse = count("sparse_transformer_enwik8") - 12_288 * 512 + (96 + 128) * 512
    assert round(sparse / 1e6) == 95
    # the module and, as in the files, embedding and head once more: 14B beside 671B, 685B in all
    module = count("deepseek_v3_mtp") - count("deepseek_v3")
    assert module == 11_610_068_224
    assert count("deepseek_v3_mtp") + 2 * 129_280 * 7168 == pytest.approx(685e9, rel=1e-3)
    # queries, keys and values of global tokens, in each of 12 layers: longformer-base-4096 has 148,659,456
    assert count("longformer_base") + 12 * 3 * (768 * 768 + 768) == 148_659_456
    # values, gate and output of twice the width
    assert count("retnet_1_3b") + 24 * 3 * 2048**2 == pytest.approx(1.3e9, rel=0.02)
    assert count("fvsbn_mnist") == 784 * 784 + 784
    # of MADE's masked matrices all numbers are kept
    assert count("made_mnist_1") == 2 * 784 * 500 + 500 + 784
    assert count("made_mnist_2") == count("made_mnist_1") + 500 * 500 + 500


@pytest.mark.parametrize(
    ("family", "names"),
    {
        "decoder": (
            "llama2_13b", "mistral_7b", "qwen25_7b", "qwen3_8b", "gpt2", "deepseek_llm_7b", "chameleon_7b",
            "mixtral_8x22b", "qwen3_235b_a22b", "deepseek_v2", "deepseek_v3_mtp", "moonlight_16b_a3b",
            "minimax_text_01", "linear_transformer_mnist", "performer_protein", "transnormer_t1", "retnet_1_3b",
            "sparse_transformer_enwik8", "llada_8b", "bd3lm_small",
        ),
        "encoder": (
            "bert_base", "roberta_base", "albert_base", "electra_base", "distilbert", "minilm_l6", "bigbird_base",
            "longformer_base",
        ),
        "recurrent": ("rnn_medium", "zaremba_medium", "gru_medium"),
        "density": ("fvsbn_mnist", "nade_mnist", "nade_mnist_2", "made_mnist_1", "pixelcnn_mnist"),
        "vision": ("vit_b16", "swin_t", "swinv2_t", "sam_vit_b", "vq_chameleon"),
        "vision-language": ("qwen2_vl_7b", "qwen25_vl_32b", "kimi_vl_a3b", "ui_tars_72b", "ui_tars_15_7b"),
    }.items(),
)  # fmt: skip
def test_every_architecture_of_the_docs_is_there(family, names):
    known = {one.name: one.family for one in networks.networks()}
    assert {name: known.get(name) for name in names} == dict.fromkeys(names, family)


def test_sizes_of_one_family_differ_where_they_should():
    large, small = presets.llama2_70b(), presets.llama2_7b()
    assert (large.kv_heads, small.kv_heads, large.max_length) == (8, 32, 4096)
    assert presets.mistral_7b().window == 4096 and presets.mistral_7b().rope_base == 1e4
    assert presets.qwen25_3b().tie_embeddings and not presets.qwen25_14b().tie_embeddings
    experts = presets.qwen3_235b_a22b().experts
    assert experts is not None and (experts.experts, experts.top_k, experts.ffn) == (128, 8, 1536)
    longformer = networks.find("longformer-base").config
    near = dataclasses.replace(longformer.transformer.pattern, near=1)
    assert near != longformer.transformer.pattern and longformer.transformer.causal is False
