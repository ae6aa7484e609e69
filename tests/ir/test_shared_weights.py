"""A weight that is used several times is one linear: one mask, chosen on all that enters it."""

from __future__ import annotations

import dataclasses

import torch
import transformers

from zeroskip.ir.capture import capture
from zeroskip.ir.facts import Roles, SparseWeights
from zeroskip.ir.linears import find_linears
from zeroskip.ir.partition import find_stages
from zeroskip.ir.statistics import Statistics
from zeroskip.passes import ApplyMasks, Observe, PassManager, PruneWanda


def albert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.AlbertConfig(
        hidden_size=64,
        embedding_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=112,
        vocab_size=160,
    )
    return transformers.AlbertModel(config).eval()


def ids(batch: int, sequence: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + sequence)
    return {"input_ids": torch.randint(3, 160, (batch, sequence), generator=generator)}


def test_layers_that_share_their_weights_are_one_stage() -> None:
    program = capture(albert(), ids(2, 9))
    shared = [linear for linear in find_linears(program) if len(linear.uses) == 3]
    assert len(shared) == 6
    place = {node: k for k, stage in enumerate(find_stages(program)) for node in stage.nodes}
    for linear in shared:
        assert len({place[use.node] for use in linear.uses}) == 1


def test_statistics_of_a_shared_weight_are_those_of_all_uses() -> None:
    model = albert()
    program = dataclasses.replace(capture(model, ids(2, 9)), calibration=[ids(2, 12), ids(1, 7)])
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    seen: list[torch.Tensor] = []
    hook = layer.ffn.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with torch.no_grad():
        for batch in program.calibration:
            model(**batch)
    hook.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    edges = Observe()(program).program.fact(Statistics).edges
    edge = edges["encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"]
    assert edge.count == len(rows) == 3 * (24 + 7)
    torch.testing.assert_close(edge.total_of_squares, rows.square().sum(0), rtol=1e-6, atol=0)


def test_a_shared_weight_is_pruned_once_to_the_exact_density() -> None:
    program = dataclasses.replace(capture(albert(), ids(2, 9)), calibration=[ids(2, 12)])
    result = PassManager([Observe(), PruneWanda("50%"), ApplyMasks()])(program).program
    assert len(result.fact(SparseWeights).masks) == len(find_linears(result))
    for linear in find_linears(result):
        zeros = (linear.weight(result) == 0).sum(1)
        assert (zeros == linear.in_features // 2).all(), linear.name


def test_labels_as_many_as_token_types_are_no_vocabulary() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=112,
        vocab_size=160,
        type_vocab_size=2,
        num_labels=2,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {**ids(2, 9), "token_type_ids": torch.zeros(2, 9, dtype=torch.int64)}
    assert capture(model, inputs).fact(Roles).heads == frozenset()
