"""Lossless verification of drafts: guess many tokens, keep exactly those the target would have written.

One forward of the target covers the last token and a whole tree of guesses; row i of the attention mask sees the
cached prefix, the ancestors of i and i itself, at position `last + depth(i)`:

    cached prefix        last   a   b   c            last
    1 1 1 1 ... 1          1                          / \\
    1 1 1 1 ... 1          1    1                    a   b
    1 1 1 1 ... 1          1        1                |
    1 1 1 1 ... 1          1    1       1            c

Then the target's own rule (processors, argmax or draw) is applied node by node, each with its own prefix, and the
walk follows the child that carries the chosen token. So every processor, criterion and random draw is called once a
token and in order, as in plain decoding: the tokens are those of `model.generate`, up to the rounding differences
between a forward of one row and of many rows (which matter only where two scores tie to the last digits).
"""

from __future__ import annotations

from typing import Any, final

import torch
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peftx.errors import GenerationError, UnsupportedError
from peftx.toolkits.decoding.cache import Undo, keep_rows, undo_kind
from peftx.toolkits.decoding.draft import Drafter, DraftTree, VerifiedStep
from peftx.toolkits.decoding.generation import Generation, Prepared, require_single


def speculative_generate(generation: Generation, drafter: Drafter) -> torch.Tensor:
    """Generate with drafts; the output is that of `generation.run_default()`.

    * Greedy: token for token the same.
    * Sampling, fixed guesses: each token is drawn from the target's processed distribution, and the walk goes on if
      a child carries it. The very same draws as plain decoding, so the same seed gives the same text.
    * Sampling, drafts with `probs`: accepted with min(1, p/q), else drawn from max(p - q, 0) / sum; the same
      distribution as plain decoding, by other draws.

    The first forward takes the prompt and one path of the draft together, so that the prompt needs no dense mask.
    Where the model or its cache cannot take a tree, each draft is cut to its longest path: sliding windows, no
    `position_ids`, attention that ignores a 4-D mask (found by one probe call, `stats["probe_calls"]`).
    `stats["linearized_drafts"]` counts the cuts. A windowed or convolutional cache takes its first draft in the
    second forward.

    Args:
        generation: batch size 1, a causal model; see `per_row` for batches.
        drafter: proposes, and may learn from what was accepted.

    Returns:
        [1, T + new] int64, with the prompt.

    Raises:
        UnsupportedError: beams, batches, encoder-decoders, no cache, or a cache that cannot be cut back.
        PeftxError: a draft that does not fit the model.
    """
    require_single(generation, "verification of drafts")
    drafter.begin(generation)
    return generation.run(lambda prepared: _Verification(generation, prepared, drafter).loop())


@final
class _Verification:
    """State of one generation. Invariant between steps: the cache holds every token but the last `pending` ones."""

    def __init__(self, generation: Generation, prepared: Prepared, drafter: Drafter) -> None:
        kwargs = dict(prepared.model_kwargs)
        cache = kwargs.pop("past_key_values", None)
        if not isinstance(cache, Cache):
            raise UnsupportedError(
                f"drafts cannot be verified on {type(generation.model).__name__}: it keeps no key/value cache that "
                "could be cut back"
            )
        for name in ("inputs_embeds", "token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                raise UnsupportedError(f"verification of drafts does not support `{name}`")
        self.generation, self.prepared, self.drafter = generation, prepared, drafter
        self.model, self.cache = generation.model, cache
        self.ids = prepared.input_ids  # [1, L]
        self.pending = prepared.pending
        self.mask: torch.Tensor | None = kwargs.pop("attention_mask", None)  # [1, prefix + L], None: all ones
        positions: torch.Tensor | None = kwargs.pop("position_ids", None)
        if positions is not None and positions.dim() != 2:
            raise UnsupportedError(
                f"verification of drafts does not support {positions.dim()}-D position ids"
            )
        self.positions = None if positions is None else positions[:, -self.pending :]  # [1, pending]
        # `generate` sets it for the models that know it
        self.few_logits = kwargs.pop("logits_to_keep", None) is not None
        self.kwargs: dict[str, Any] = kwargs
        self.undo = undo_kind(cache)
        possible = self.undo is Undo.ANY_ROWS and self.positions is not None
        if possible:
            possible = self._as_mask(torch.ones(1, 1, device=self.ids.device)) is not None
        self.takes_trees: bool | None = None if possible else False  # None: unknown until the probe

    # --------------------------------------------------------------------------------------------------- loop
    def loop(self) -> torch.Tensor:
        streamer = self.generation.streamer
        first, ended = True, False
        self._prefill_chunks()
        while not ended:
            if first and self.undo is Undo.LAST_ROWS:
                tree = DraftTree.empty()  # recording the past of a whole prompt would hold every state of it
            else:
                tree = self._draft(linear=first)
            rows = self.ids[0, -self.pending :]
            logits, hidden = self._forward(tree, first=first)
            if first and self.undo is Undo.LAST_ROWS:
                self._record_past()
            tokens, accepted, ended = self._walk(tree, logits)
            if not ended:
                self._commit(tree, accepted, recorded=not first)
            if hidden is not None:
                kept = [*range(self.pending), *(self.pending + node for node in accepted)]
                hidden = tuple(layer[kept] for layer in hidden)
            new = torch.tensor(tokens, dtype=torch.int64, device=self.ids.device)
            self.generation.add("draft_tokens", len(tree))
            self.generation.add("accepted_tokens", len(accepted))
            if not ended:
                self._advance(len(accepted))
            self.drafter.observe(
                VerifiedStep(
                    tree=tree,
                    accepted=tuple(accepted),
                    tokens=new,
                    logits=logits,
                    rows=torch.cat([rows, new[: len(accepted)]]),
                    hidden=hidden,
                )
            )
            first = False
        if streamer is not None:
            streamer.end()
        return self.ids

    def _draft(self, *, linear: bool) -> DraftTree:
        # One less than what is left: the target adds a token of its own.
        limit = self.prepared.criteria.max_length - self.ids.shape[1] - 1
        if limit < 1:
            return DraftTree.empty()
        tree = self.drafter.propose(self.ids[0], limit).truncated(limit)
        if tree.is_linear:
            return tree
        if not linear and self.takes_trees is None:
            self.takes_trees = self._probe(int(tree.tokens[0]))
        if linear or not self.takes_trees:
            self.generation.add("linearized_drafts", 1)
            return tree.longest_path()
        return tree

    def _walk(self, tree: DraftTree, logits: torch.Tensor) -> tuple[list[int], list[int], bool]:
        """Choose tokens along `tree`, append them to `ids`.

        Returns:
            New tokens, accepted nodes, and whether generation ends here.
        """
        tokens: list[int] = []
        accepted: list[int] = []
        node = -1
        while True:
            scores = logits[node + 1 : node + 2].to(torch.float32, copy=True)
            scores = self.prepared.processors(self.ids, scores)  # row 0 is the root's
            token, follow = self._choose(tree, node, scores)
            self.ids = torch.cat([self.ids, token[:, None]], dim=1)
            tokens.append(int(token))
            if follow is not None:
                accepted.append(follow)
            if self.generation.streamer is not None:
                self.generation.streamer.put(token.cpu())
            if bool(self.prepared.criteria(self.ids, None).all()):
                return tokens, accepted, True
            if follow is None:
                return tokens, accepted, False
            node = follow

    def _choose(self, tree: DraftTree, node: int, scores: torch.Tensor) -> tuple[torch.Tensor, int | None]:
        """The token [1] after `node`, and the child that carries it, if the draft guessed it."""
        if tree.probs is None or not self.prepared.config.do_sample or node + 1 == len(tree):
            token = self.prepared.pick(scores)
            return token, tree.children.get((node, int(token)))
        guess = int(tree.tokens[node + 1])
        p = torch.softmax(scores, dim=-1)  # [1, V]
        q = tree.probs[node + 1].to(p)  # [V]
        if q.shape != p.shape[1:] or not bool(q[guess] > 0):
            raise GenerationError(
                f"draft probs: row {node + 1} must be [{p.shape[1]}] and positive at its token {guess}, got "
                f"{tuple(q.shape)}" + (f" with {float(q[guess])}" if q.shape == p.shape[1:] else "")
            )
        if bool(torch.rand((), device=p.device) < p[0, guess] / q[guess]):  # accept with min(1, p/q)
            return torch.full((1,), guess, dtype=torch.int64, device=p.device), node + 1
        rest = (p - q).clamp(min=0)  # residual; multinomial normalises
        if float(rest.sum()) == 0:  # p = q up to rounding, which then also rounded p/q below 1
            rest = p
        return torch.multinomial(rest, num_samples=1)[:, 0], None

    # ------------------------------------------------------------------------------------------------ forward
    def _prefill_chunks(self) -> None:
        """Feed the prompt but its last chunk, where the config asks for chunks."""
        size = self.prepared.config.prefill_chunk_size
        while size is not None and self.pending > size:
            after = self.pending - size
            upto = self.ids.shape[1] - after
            mask = None if self.mask is None else self.mask[:, : self.mask.shape[1] - after]
            positions = None if self.positions is None else self.positions[:, :size]
            self._call(self.ids[:, :upto], size, mask, positions, keep=1)
            self.pending = after
            self.positions = None if self.positions is None else self.positions[:, size:]

    def _forward(
        self, tree: DraftTree, *, first: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """The target over the pending tokens and the tree: logits [1 + N, V], and hidden states if asked for."""
        device, rows = self.ids.device, self.pending + len(tree)
        fed = torch.cat([self.ids, tree.tokens.to(device)[None]], dim=1)
        positions = None
        if self.positions is not None:
            positions = torch.cat([self.positions, self.positions[:, -1:] + tree.depths.to(device)], dim=1)
        if tree.is_linear:
            mask = self.mask
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(1, len(tree))], dim=1)
        else:
            mask = self._as_mask(self._visible(tree.ancestor_mask))
        output = self._call(fed, rows, mask, positions, keep=len(tree) + 1, first=first)
        logits = output.logits[0, -(len(tree) + 1) :]
        if not self.drafter.needs_hidden:
            return logits, None
        return logits, tuple(layer[0] for layer in output.hidden_states)

    def _call(
        self,
        fed: torch.Tensor,
        rows: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        *,
        keep: int,
        first: bool = False,
    ) -> Any:
        kwargs = dict(self.kwargs, past_key_values=self.cache, attention_mask=mask)
        if positions is not None:
            kwargs["position_ids"] = positions
        if self.few_logits:
            kwargs["logits_to_keep"] = keep
        inputs = self.model.prepare_inputs_for_generation(
            fed, next_sequence_length=rows, is_first_iteration=first, **kwargs
        )
        return self.model(**inputs, output_hidden_states=self.drafter.needs_hidden, return_dict=True)

    def _visible(self, ancestors: torch.Tensor) -> torch.Tensor:
        """[1 + N, cached + 1 + N] bool: the last token's row, then the nodes' rows, from `ancestors` [N, N].

        Soft tokens stand in the cache too, and have no columns here: whoever put them there adds theirs.
        """
        nodes = len(ancestors)
        cached = int(self.cache.get_seq_length()) if self.mask is None else self.mask.shape[1] - 1
        visible = torch.zeros(nodes + 1, cached + 1 + nodes, dtype=torch.bool)
        visible[:, : cached + 1] = True
        if self.mask is not None:
            visible[:, : cached + 1] = self.mask[0, : cached + 1].bool().cpu()
        visible[1:, cached + 1 :] = ancestors
        return visible.to(self.ids.device)

    def _as_mask(self, visible: torch.Tensor) -> torch.Tensor | None:
        """[rows, columns] as the 4-D mask that the model's attention reads; None where it reads none.

        sdpa reads booleans, eager adds 0 or the dtype's minimum: each implementation registers the function that
        makes its masks, so that function is asked.
        """
        config = self.model.config.get_text_config(decoder=True)
        if config._attn_implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
            return None
        rows, columns = visible.shape
        mask = ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation](
            batch_size=1,
            q_length=rows,
            kv_length=columns,
            q_offset=columns - rows,
            kv_offset=0,
            mask_function=lambda _batch, _head, row, column: visible[row - (columns - rows), column].bool(),
            attention_mask=None,
            allow_is_causal_skip=False,
            dtype=self.model.dtype,
            config=config,
            use_vmap=False,
            device=visible.device,
        )
        return mask if isinstance(mask, torch.Tensor) and mask.dim() == 4 else None

    def _probe(self, token: int) -> bool:
        """Whether the model obeys a 4-D mask and position ids, by one call over four rows after the last token.

        A decoy is seen by itself only; two twins, same token, same position, see the prefix and themselves; a witness
        sees the decoy too. Twins must agree, far closer than the witness. A model that ignores mask or positions
        lets the second twin see the decoy and the first twin.
        """
        device, last = self.ids.device, int(self.ids[0, -1])
        ancestors = torch.eye(4, dtype=torch.bool)
        ancestors[3, 0] = True
        assert self.positions is not None  # trees are refused before where there are none
        positions = torch.cat([self.positions[:, -1:], (self.positions[:, -1:] + 1).expand(1, 4)], dim=1)
        fed = torch.cat([self.ids, torch.tensor([[last, token, token, token]], device=device)], dim=1)
        output = self._call(fed, 5, self._as_mask(self._visible(ancestors)), positions, keep=5)
        self.cache.crop(-5)
        self.generation.add("probe_calls", 1)
        one, two, witness = output.logits[0, -3:].float()
        apart = float((one - two).abs().max())
        rounding = 4 * torch.finfo(self.model.dtype).eps * float(one.abs().max())
        return apart <= max(0.1 * float((witness - one).abs().max()), rounding)

    # --------------------------------------------------------------------------------------------- bookkeeping
    def _commit(self, tree: DraftTree, accepted: list[int], *, recorded: bool) -> None:
        """Take the rejected rows out of the cache. The last N of its rows are the draft's."""
        rejected = len(tree) - len(accepted)
        if tree.is_linear:
            # A cache that records its past wants a call even for nothing, to drop what it no longer needs.
            if rejected or (recorded and self.undo is Undo.LAST_ROWS):
                self.cache.crop(-rejected)
        elif rejected:
            before = int(self.cache.get_seq_length()) - len(tree)
            kept = [*range(before), *(before + node for node in accepted)]
            keep_rows(self.cache, torch.tensor(kept, dtype=torch.int64))

    def _advance(self, accepted: int) -> None:
        """Extend mask and positions by the accepted tokens and the one after them, which alone is pending now."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(1, accepted + 1)], dim=1)
        if self.positions is not None:
            self.positions = self.positions[:, -1:] + accepted + 1
        self.pending = 1

    def _record_past(self) -> None:
        if not self.cache.is_croppable:
            kinds = {type(layer).__name__ for layer in self.cache.layers if not layer.is_croppable}
            raise UnsupportedError(
                f"drafts cannot be verified on {type(self.model).__name__}: its recurrent state "
                f"({', '.join(sorted(kinds))}) cannot go back over rejected tokens"
            )
        self.cache.activate_past_recording()
