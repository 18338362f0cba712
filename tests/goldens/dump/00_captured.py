import math
import operator

import torch


class Graph(torch.nn.Module):
    def forward(
        self,
        l_cache_,  # f32[2, 2, 8, 4]
        l_at_,  # i64[6]
        l_new_,  # f32[2, 2, 6, 4]
        l_q_,  # f32[2, 4, 6, 4]
        l_iq_,  # f32[2, 6, 32, 4]
        l_ik_,  # f32[2, 8, 4]
        l_w_,  # f32[2, 6, 32]
    ):
        # toy.py:11 in forward: cache.index_copy_(2, at, new)
        index_copy_ = torch.ops.aten.index_copy_.default(l_cache_, 2, l_at_, l_new_)  # f32[2, 2, 8, 4]
        # toy.py:12 in forward: k = cache.repeat_interleave(2, 1)
        repeat_interleave = torch.ops.aten.repeat_interleave.self_int(index_copy_, 2, 1)  # f32[2, 4, 8, 4]
        # toy.py:13 in forward: causal = torch.arange(cache.shape[2])[None] <= at[:, None]
        arange = torch.ops.aten.arange.default(8, device=torch.device("cpu"), pin_memory=False)  # i64[8]
        unsqueeze = torch.ops.aten.unsqueeze.default(arange, 0)  # i64[1, 8]
        unsqueeze_1 = torch.ops.aten.unsqueeze.default(l_at_, 1)  # i64[6, 1]
        le = torch.ops.aten.le.Tensor(unsqueeze, unsqueeze_1)  # bool[6, 8]
        # toy.py:14 in forward: x = F.scaled_dot_product_attention(q, k, k, attn_mask=causal)
        scaled_dot_product_attention = torch.ops.aten.scaled_dot_product_attention.default(l_q_, repeat_interleave, repeat_interleave, le)  # f32[2, 4, 6, 4]
        # toy.py:16 in forward: scores = torch.einsum("bshd,btd->bsht", iq, ik).relu() * 0.25
        einsum = torch.ops.aten.einsum.default('bshd,btd->bsht', [l_iq_, l_ik_])  # f32[2, 6, 32, 8]
        relu = torch.ops.aten.relu.default(einsum)  # f32[2, 6, 32, 8]
        mul = torch.ops.aten.mul.Tensor(relu, 0.25)  # f32[2, 6, 32, 8]
        # toy.py:17 in forward: scores = torch.einsum("bsh,bsht->bst", w, scores).masked_fill(~causal, -math.inf)
        einsum_1 = torch.ops.aten.einsum.default('bsh,bsht->bst', [l_w_, mul])  # f32[2, 6, 8]
        bitwise_not = torch.ops.aten.bitwise_not.default(le)  # bool[6, 8]
        masked_fill = torch.ops.aten.masked_fill.Scalar(einsum_1, bitwise_not, -math.inf)  # f32[2, 6, 8]
        # toy.py:18 in forward: chosen = torch.full((2, 6, 8), -math.inf).scatter(-1, scores.topk(3, -1).indices, 0.0)
        full = torch.ops.aten.full.default([2, 6, 8], -math.inf, device=torch.device("cpu"), pin_memory=False)  # f32[2, 6, 8]
        topk = torch.ops.aten.topk.default(masked_fill, 3)  # (f32[2, 6, 3], i64[2, 6, 3])
        getitem = topk[0]  # f32[2, 6, 3]
        getitem_1 = topk[1]  # i64[2, 6, 3]
        scatter = torch.ops.aten.scatter.value(full, -1, getitem_1, 0.0)  # f32[2, 6, 8]
        # toy.py:19 in forward: mask = (chosen + torch.where(causal, 0.0, -math.inf))[:, None]
        where = torch.ops.aten.where.Scalar(le, 0.0, -math.inf)  # f32[6, 8]
        add = torch.ops.aten.add.Tensor(scatter, where)  # f32[2, 6, 8]
        unsqueeze_2 = torch.ops.aten.unsqueeze.default(add, 1)  # f32[2, 1, 6, 8]
        # toy.py:20 in forward: x = F.scaled_dot_product_attention(x, k, k, attn_mask=mask)
        scaled_dot_product_attention_1 = torch.ops.aten.scaled_dot_product_attention.default(scaled_dot_product_attention, repeat_interleave, repeat_interleave, unsqueeze_2)  # f32[2, 4, 6, 4]
        # toy.py:22 in forward: weights = (x @ k.mT).softmax(-1)
        m_t = torch.ops.aten.mT.default(repeat_interleave)  # f32[2, 4, 4, 8] strides (128, 32, 1, 4)
        matmul = torch.ops.aten.matmul.default(scaled_dot_product_attention_1, m_t)  # f32[2, 4, 6, 8]
        softmax = torch.ops.aten.softmax.int(matmul, -1)  # f32[2, 4, 6, 8]
        # toy.py:23 in forward: return weights @ k, weights
        matmul_1 = torch.ops.aten.matmul.default(softmax, repeat_interleave)  # f32[2, 4, 6, 4]
        return (matmul_1, softmax)
