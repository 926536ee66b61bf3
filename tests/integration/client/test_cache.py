"""The remote session behind ``SwarmCache``: opened late, sized right, freed always."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from swarm.client.cache import SwarmCache
from swarm.protocol.errors import NetworkError, UsageError
from swarm.protocol.messages import MAX_ROWS

PROMPT = torch.tensor([[5, 17, 33, 9, 60, 41]])


def test_session_is_sized_for_the_call(make_swarm: Any) -> None:
    swarm = make_swarm()
    swarm.model.generate(PROMPT, max_new_tokens=10, do_sample=False, num_beams=4)
    (chain,) = swarm.client.chains
    assert chain.closed
    assert (chain.request.rows, chain.request.maximum_tokens) == (4, 16)
    assert swarm.model.latest_session.plan == chain.plan
    assert swarm.model.latest_session.passes == chain.passes == 10


class Fail(StoppingCriteria):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        raise KeyboardInterrupt


def test_session_is_freed_on_exceptions(make_swarm: Any) -> None:
    swarm = make_swarm()
    with pytest.raises(KeyboardInterrupt):
        swarm.model.generate(
            PROMPT, max_new_tokens=10, stopping_criteria=StoppingCriteriaList([Fail()])
        )
    assert [chain.closed for chain in swarm.client.chains] == [True]


def test_session_is_freed_when_a_hop_fails(make_swarm: Any) -> None:
    swarm = make_swarm()
    swarm.client.fail_at_pass = 3
    with pytest.raises(NetworkError, match="a hop is gone"):
        swarm.model.generate(PROMPT, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert [chain.closed for chain in swarm.client.chains] == [True]


def test_forgotten_session_is_freed(make_swarm: Any) -> None:
    swarm = make_swarm()
    cache = swarm.model.new_cache(32)
    swarm.model(PROMPT, past_key_values=cache)
    (chain,) = swarm.client.chains
    del cache
    gc.collect()
    swarm.model._background.run(_nothing())  # whatever was submitted before has started by now
    assert chain.closed


async def _nothing() -> None:
    return None


def test_turns_share_a_session(make_swarm: Any) -> None:
    swarm = make_swarm()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with swarm.model.new_cache(maximum_tokens=64) as cache:
        first = swarm.model.generate(PROMPT, past_key_values=cache, **options)
        second_prompt = torch.cat([first, torch.tensor([[7, 8, 9]])], dim=-1)
        second = swarm.model.generate(second_prompt, past_key_values=cache, **options)
        (chain,) = swarm.client.chains
        assert not chain.closed
    assert chain.closed
    assert first.tolist() == swarm.whole.generate(PROMPT, **options).tolist()
    assert second.tolist() == swarm.whole.generate(second_prompt, **options).tolist()


def test_closed_cache_says_what_to_do(make_swarm: Any) -> None:
    swarm = make_swarm()
    output = swarm.model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    with pytest.raises(UsageError, match="new_cache"):
        swarm.model.generate(
            output.sequences, max_new_tokens=4, past_key_values=output.past_key_values
        )


def test_crop_and_reorder_reach_the_chain(make_swarm: Any) -> None:
    swarm = make_swarm()
    ids = torch.tensor([[5, 17, 33, 9], [11, 4, 50, 51]])
    new = torch.tensor([[60], [61]])
    with swarm.model.new_cache(16) as cache, torch.no_grad():
        swarm.model(ids, past_key_values=cache)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.reorder_cache(torch.tensor([0, 0]))
        assert cache.get_seq_length() == 3
        actual = swarm.model(new, past_key_values=cache).logits
        expected = swarm.whole(torch.cat([ids[[1, 1], :3], new], dim=-1)).logits[:, -1:]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("argument", "kept"), [(0, 10), (-3, 7), (4, 4), (12, 10), (-12, 0)])
def test_crop_arguments(make_swarm: Any, argument: int, kept: int) -> None:
    cache = make_swarm().model.new_cache(16)
    cache._length = 10
    cache.crop(argument)
    assert cache.get_seq_length() == kept


def test_orders_compose_and_identity_costs_nothing(make_swarm: Any) -> None:
    cache: SwarmCache = make_swarm().model.new_cache()
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    assert not cache._row_order
    cache.reorder_cache(torch.tensor([0, 0, 1]))
    cache.reorder_cache(torch.tensor([2, 1, 0]))
    assert cache._row_order == (1, 0, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "on the left"),
        ({"attention_mask": torch.tensor([[0, 0, 0, 0, 0, 0]])}, "on the left"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6, 7, 8]])}, "position_ids"),
        ({"cache_implementation": "static"}, "on the nodes"),
        ({"num_beams": MAX_ROWS + 1}, "at most"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*right-padding")
def test_what_a_swarm_cannot_do_is_said(
    make_swarm: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        make_swarm().model.generate(PROMPT, max_new_tokens=4, **options)


def test_a_cache_that_is_too_small(make_swarm: Any) -> None:
    swarm = make_swarm()
    with swarm.model.new_cache(8) as cache, pytest.raises(UsageError, match="was made for 8"):
        swarm.model.generate(PROMPT, max_new_tokens=4, past_key_values=cache)


def test_a_swarm_is_no_assistant(make_swarm: Any, make_whole_model: Any) -> None:
    swarm = make_swarm()
    main = make_whole_model("llama", seed=3)
    with pytest.raises(UsageError, match="must be a local model"):
        main.generate(PROMPT, assistant_model=swarm.model, max_new_tokens=4)


def test_closing_the_model_leaves_the_swarm(make_swarm: Any) -> None:
    swarm = make_swarm()
    with swarm.model:
        swarm.model.generate(PROMPT, max_new_tokens=2)
    assert swarm.client.closed
    swarm.model.close()
    with pytest.raises(RuntimeError, match="closed"):
        swarm.model.generate(PROMPT, max_new_tokens=2)
