# SPDX-License-Identifier: Apache-2.0
"""Encoders that norm after the sum: BERT and RoBERTa. The sums tie all layers."""

from nm_permute_plugin.specs.architectures.building import (
    attention,
    linear,
    mlp,
    output_fixed,
    under,
)
from nm_permute_plugin.specs.spec import Spec

ATTENTION: Spec = attention("self.{query,key}", "self.value", "output.dense")
ENCODER: Spec = {
    "embeddings.{word,position,token_type}_embeddings.weight": "_ residual",
    "embeddings.LayerNorm.{weight,bias}": "residual",
    **under("encoder.layer.{i}.attention.", ATTENTION),
    **under("encoder.layer.{i}.", mlp("intermediate.dense", "output.dense")),
    "encoder.layer.{i}.{attention.output,output}.LayerNorm.{weight,bias}": "residual",
}
WITHOUT_HEAD: Spec = output_fixed({**ENCODER, **linear("pooler.dense?", "_ residual")})
TOKEN_LABELS: Spec = linear("classifier", "_ residual")

BERT_CLASSES: dict[str, Spec] = {
    "BertModel": WITHOUT_HEAD,
    "BertForSequenceClassification": {
        **under(
            "bert.", {**ENCODER, **linear("pooler.dense", "hidden.pooler residual")}
        ),
        **linear("classifier", "_ hidden.pooler"),
    },
    "BertForTokenClassification": {**under("bert.", ENCODER), **TOKEN_LABELS},
    "RobertaModel": WITHOUT_HEAD,
    "RobertaForSequenceClassification": {
        **under("roberta.", ENCODER),
        **linear("classifier.dense", "hidden.classifier residual"),
        **linear("classifier.out_proj", "_ hidden.classifier"),
    },
    "RobertaForTokenClassification": {**under("roberta.", ENCODER), **TOKEN_LABELS},
}
