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
        # toy.py:14 in forward: x = F.scaled_dot_product_attention(q, k, k, attn_mask=causal)
        attention_default = torch.ops.clsa.attention.default(l_q_, index_copy_, index_copy_, None, None, [l_at_], None, 0.5, 0.0, 'kv <= in0(q)')  # (f32[2, 4, 6, 4] strides (96, 4, 16, 1), f32[2, 4, 6])
        getitem_2 = attention_default[0]  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        permute_default = torch.ops.aten.permute.default(getitem_2, [0, 1, 2, 3])  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        clone_default = torch.ops.aten.clone.default(permute_default, memory_format=torch.contiguous_format)  # f32[2, 4, 6, 4]
        permute_default_1 = torch.ops.aten.permute.default(clone_default, [0, 1, 2, 3])  # f32[2, 4, 6, 4]
        # toy.py:18 in forward: chosen = torch.full((2, 6, 8), -math.inf).scatter(-1, scores.topk(3, -1).indices, 0.0)
        permute_default_2 = torch.ops.aten.permute.default(l_iq_, [0, 2, 1, 3])  # f32[2, 32, 6, 4] strides (768, 4, 128, 1)
        unsqueeze_default = torch.ops.aten.unsqueeze.default(l_ik_, 1)  # f32[2, 1, 8, 4]
        permute_default_3 = torch.ops.aten.permute.default(l_w_, [0, 2, 1])  # f32[2, 32, 6] strides (192, 1, 32)
        index_topk_default = torch.ops.clsa.index_topk.default(permute_default_2, unsqueeze_default, permute_default_3, None, None, None, [l_at_], 3, 1.0, 'sum: 0.25*weight*Max(0, dot)', 'kv <= in0(q)', False)  # i32[2, 1, 6, 3]
        # toy.py:20 in forward: x = F.scaled_dot_product_attention(x, k, k, attn_mask=mask)
        sparse_attention_default = torch.ops.clsa.sparse_attention.default(permute_default_1, index_copy_, index_copy_, index_topk_default, None, None, [], None, 0.5, 0.0, '')  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        permute_default_4 = torch.ops.aten.permute.default(sparse_attention_default, [0, 1, 2, 3])  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        clone_default_1 = torch.ops.aten.clone.default(permute_default_4, memory_format=torch.contiguous_format)  # f32[2, 4, 6, 4]
        permute_default_5 = torch.ops.aten.permute.default(clone_default_1, [0, 1, 2, 3])  # f32[2, 4, 6, 4]
        # toy.py:22 in forward: weights = (x @ k.mT).softmax(-1)
        m_t = torch.ops.aten.mT.default(repeat_interleave)  # f32[2, 4, 4, 8] strides (128, 32, 1, 4)
        matmul = torch.ops.aten.matmul.default(permute_default_5, m_t)  # f32[2, 4, 6, 8]
        softmax = torch.ops.aten.softmax.int(matmul, -1)  # f32[2, 4, 6, 8]
        # toy.py:23 in forward: return weights @ k, weights
        matmul_1 = torch.ops.aten.matmul.default(softmax, repeat_interleave)  # f32[2, 4, 6, 4]
        return (matmul_1, softmax)
