# SPDX-License-Identifier: Apache-2.0
"""Encoders that norm after the sum: BERT and RoBERTa. The sums tie all layers."""

from nm_permute_plugin.specs.architectures.building import output_fixed, under
from nm_permute_plugin.specs.spec import Spec

ENCODER: Spec = {
    "embeddings.{word,position,token_type}_embeddings.weight": "_ residual",
    "embeddings.LayerNorm.{weight,bias}": "residual",
    "encoder.layer.{i}.attention.self.{query,key}.weight": "_ residual",
    "encoder.layer.{i}.attention.self.{query,key}.bias": "_",
    "encoder.layer.{i}.attention.self.value.weight": "value.{i} residual",
    "encoder.layer.{i}.attention.self.value.bias": "value.{i}",
    "encoder.layer.{i}.attention.output.dense.weight": "residual value.{i}:heads",
    "encoder.layer.{i}.attention.output.dense.bias": "residual",
    "encoder.layer.{i}.intermediate.dense.weight": "hidden.{i} residual",
    "encoder.layer.{i}.intermediate.dense.bias": "hidden.{i}",
    "encoder.layer.{i}.output.dense.weight": "residual hidden.{i}",
    "encoder.layer.{i}.output.dense.bias": "residual",
    "encoder.layer.{i}.{attention.output,output}.LayerNorm.{weight,bias}": "residual",
}
POOLER: Spec = {"pooler.dense.weight?": "_ residual", "pooler.dense.bias?": "_"}
READ_POOLER: Spec = {
    "pooler.dense.weight": "hidden.pooler residual",
    "pooler.dense.bias": "hidden.pooler",
}
LABELS: Spec = {"classifier.weight": "_ residual", "classifier.bias": "_"}
ROBERTA_LABELS: Spec = {
    "classifier.dense.weight": "hidden.classifier residual",
    "classifier.dense.bias": "hidden.classifier",
    "classifier.out_proj.weight": "_ hidden.classifier",
    "classifier.out_proj.bias": "_",
}

BERT_CLASSES: dict[str, Spec] = {
    "BertModel": output_fixed({**ENCODER, **POOLER}),
    "BertForSequenceClassification": {
        **under("bert.", {**ENCODER, **READ_POOLER}),
        "classifier.weight": "_ hidden.pooler",
        "classifier.bias": "_",
    },
    "BertForTokenClassification": {**under("bert.", ENCODER), **LABELS},
    "RobertaModel": output_fixed({**ENCODER, **POOLER}),
    "RobertaForSequenceClassification": {
        **under("roberta.", ENCODER),
        **ROBERTA_LABELS,
    },
    "RobertaForTokenClassification": {**under("roberta.", ENCODER), **LABELS},
}
