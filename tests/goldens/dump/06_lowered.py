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
        arange_3 = torch.ops.aten.arange.default(6, device=torch.device("cpu"), pin_memory=False)  # i64[6]
        view_2 = torch.ops.aten.view.default(arange_3, [1, 1, -1, 1])  # i64[1, 1, 6, 1]
        arange_4 = torch.ops.aten.arange.default(8, device=torch.device("cpu"), pin_memory=False)  # i64[8]
        view_3 = torch.ops.aten.view.default(arange_4, [1, 1, 1, -1])  # i64[1, 1, 1, 8]
        index = torch.ops.aten.index.Tensor(l_at_, [view_2])  # i64[1, 1, 6, 1]
        le_1 = torch.ops.aten.le.Tensor(view_3, index)  # bool[1, 1, 6, 8]
        reshape = torch.ops.aten.reshape.default(le_1, [1, 1, 6, 8])  # bool[1, 1, 6, 8]
        expand = torch.ops.aten.expand.default(reshape, [2, -1, 6, 8])  # bool[2, 1, 6, 8] strides (0, 48, 8, 1)
        scaled_dot_product_attention_2 = torch.ops.aten.scaled_dot_product_attention.default(l_q_, index_copy_, index_copy_, expand, scale=0.5, enable_gqa=True)  # f32[2, 4, 6, 4]
        transpose = torch.ops.aten.transpose.int(scaled_dot_product_attention_2, 1, 2)  # f32[2, 6, 4, 4] strides (96, 4, 24, 1)
        contiguous = torch.ops.aten.contiguous.default(transpose)  # f32[2, 6, 4, 4]
        transpose_1 = torch.ops.aten.transpose.int(contiguous, 1, 2)  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        permute_default = torch.ops.aten.permute.default(transpose_1, [0, 1, 2, 3])  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        clone_default = torch.ops.aten.clone.default(permute_default, memory_format=torch.contiguous_format)  # f32[2, 4, 6, 4]
        permute_default_1 = torch.ops.aten.permute.default(clone_default, [0, 1, 2, 3])  # f32[2, 4, 6, 4]
        # toy.py:18 in forward: chosen = torch.full((2, 6, 8), -math.inf).scatter(-1, scores.topk(3, -1).indices, 0.0)
        permute_default_2 = torch.ops.aten.permute.default(l_iq_, [0, 2, 1, 3])  # f32[2, 32, 6, 4] strides (768, 4, 128, 1)
        unsqueeze_default = torch.ops.aten.unsqueeze.default(l_ik_, 1)  # f32[2, 1, 8, 4]
        permute_default_3 = torch.ops.aten.permute.default(l_w_, [0, 2, 1])  # f32[2, 32, 6] strides (192, 1, 32)
        to = torch.ops.aten.to.dtype(permute_default_2, torch.float32)  # f32[2, 32, 6, 4] strides (768, 4, 128, 1)
        reshape_1 = torch.ops.aten.reshape.default(to, [2, 1, 192, 4])  # f32[2, 1, 192, 4]
        to_1 = torch.ops.aten.to.dtype(unsqueeze_default, torch.float32)  # f32[2, 1, 8, 4]
        transpose_2 = torch.ops.aten.transpose.int(to_1, -1, -2)  # f32[2, 1, 4, 8] strides (32, 32, 1, 4)
        matmul_2 = torch.ops.aten.matmul.default(reshape_1, transpose_2)  # f32[2, 1, 192, 8]
        mul_1 = torch.ops.aten.mul.Tensor(matmul_2, 1.0)  # f32[2, 1, 192, 8]
        reshape_2 = torch.ops.aten.reshape.default(mul_1, [2, 32, 6, 8])  # f32[2, 32, 6, 8]
        to_2 = torch.ops.aten.to.dtype(permute_default_3, torch.float32)  # f32[2, 32, 6] strides (192, 1, 32)
        unsqueeze_3 = torch.ops.aten.unsqueeze.default(to_2, -1)  # f32[2, 32, 6, 1] strides (192, 1, 32, 1)
        relu_1 = torch.ops.aten.relu.default(reshape_2)  # f32[2, 32, 6, 8]
        mul_2 = torch.ops.aten.mul.Tensor(unsqueeze_3, 0.25)  # f32[2, 32, 6, 1] strides (192, 1, 32, 32)
        mul_3 = torch.ops.aten.mul.Tensor(mul_2, relu_1)  # f32[2, 32, 6, 8] strides (1536, 8, 256, 1)
        unsqueeze_4 = torch.ops.aten.unsqueeze.default(mul_3, 1)  # f32[2, 1, 32, 6, 8] strides (1536, 256, 8, 256, 1)
        sum_1 = torch.ops.aten.sum.dim_IntList(unsqueeze_4, [2])  # f32[2, 1, 6, 8]
        arange_7 = torch.ops.aten.arange.default(6, device=torch.device("cpu"), pin_memory=False)  # i64[6]
        view_6 = torch.ops.aten.view.default(arange_7, [1, 1, -1, 1])  # i64[1, 1, 6, 1]
        arange_8 = torch.ops.aten.arange.default(8, device=torch.device("cpu"), pin_memory=False)  # i64[8]
        view_7 = torch.ops.aten.view.default(arange_8, [1, 1, 1, -1])  # i64[1, 1, 1, 8]
        index_1 = torch.ops.aten.index.Tensor(l_at_, [view_6])  # i64[1, 1, 6, 1]
        le_2 = torch.ops.aten.le.Tensor(view_7, index_1)  # bool[1, 1, 6, 8]
        where_1 = torch.ops.aten.where.ScalarOther(le_2, sum_1, -math.inf)  # f32[2, 1, 6, 8]
        sort = torch.ops.aten.sort.stable(where_1, stable=True, descending=True)  # (f32[2, 1, 6, 8], i64[2, 1, 6, 8])
        getitem_3 = sort[0]  # f32[2, 1, 6, 8]
        getitem_4 = sort[1]  # i64[2, 1, 6, 8]
        slice_1 = torch.ops.aten.slice.Tensor(getitem_3, 3, 0, 3)  # f32[2, 1, 6, 3] strides (48, 48, 8, 1)
        slice_2 = torch.ops.aten.slice.Tensor(getitem_4, 3, 0, 3)  # i64[2, 1, 6, 3] strides (48, 48, 8, 1)
        eq = torch.ops.aten.eq.Scalar(slice_1, -math.inf)  # bool[2, 1, 6, 3]
        where_2 = torch.ops.aten.where.ScalarSelf(eq, 2147483647, slice_2)  # i64[2, 1, 6, 3]
        sort_1 = torch.ops.aten.sort.default(where_2)  # (i64[2, 1, 6, 3], i64[2, 1, 6, 3])
        getitem_5 = sort_1[0]  # i64[2, 1, 6, 3]
        eq_1 = torch.ops.aten.eq.Scalar(getitem_5, 2147483647)  # bool[2, 1, 6, 3]
        where_3 = torch.ops.aten.where.ScalarSelf(eq_1, -1, getitem_5)  # i64[2, 1, 6, 3]
        to_3 = torch.ops.aten.to.dtype(where_3, torch.int32)  # i32[2, 1, 6, 3]
        # toy.py:20 in forward: x = F.scaled_dot_product_attention(x, k, k, attn_mask=mask)
        clamp = torch.ops.aten.clamp.default(to_3, 0)  # i32[2, 1, 6, 3]
        to_4 = torch.ops.aten.to.dtype(clamp, torch.int64)  # i64[2, 1, 6, 3]
        expand_1 = torch.ops.aten.expand.default(to_4, [2, 2, 6, 3])  # i64[2, 2, 6, 3] strides (18, 0, 3, 1)
        reshape_3 = torch.ops.aten.reshape.default(expand_1, [2, 2, 18, 1])  # i64[2, 2, 18, 1] strides (18, 0, 1, 1)
        expand_2 = torch.ops.aten.expand.default(reshape_3, [2, 2, 18, 4])  # i64[2, 2, 18, 4] strides (18, 0, 1, 0)
        gather = torch.ops.aten.gather.default(index_copy_, 2, expand_2)  # f32[2, 2, 18, 4]
        view_8 = torch.ops.aten.view.default(gather, [2, 2, 6, 3, 4])  # f32[2, 2, 6, 3, 4]
        expand_3 = torch.ops.aten.expand.default(reshape_3, [2, 2, 18, 4])  # i64[2, 2, 18, 4] strides (18, 0, 1, 0)
        gather_1 = torch.ops.aten.gather.default(index_copy_, 2, expand_3)  # f32[2, 2, 18, 4]
        view_9 = torch.ops.aten.view.default(gather_1, [2, 2, 6, 3, 4])  # f32[2, 2, 6, 3, 4]
        reshape_4 = torch.ops.aten.reshape.default(permute_default_1, [2, 2, 2, 6, 4])  # f32[2, 2, 2, 6, 4]
        transpose_3 = torch.ops.aten.transpose.int(reshape_4, 2, 3)  # f32[2, 2, 6, 2, 4] strides (96, 48, 4, 24, 1)
        transpose_4 = torch.ops.aten.transpose.int(view_8, -1, -2)  # f32[2, 2, 6, 4, 3] strides (144, 72, 12, 1, 4)
        matmul_3 = torch.ops.aten.matmul.default(transpose_3, transpose_4)  # f32[2, 2, 6, 2, 3]
        to_5 = torch.ops.aten.to.dtype(matmul_3, torch.float32)  # f32[2, 2, 6, 2, 3]
        mul_4 = torch.ops.aten.mul.Tensor(to_5, 0.5)  # f32[2, 2, 6, 2, 3]
        transpose_5 = torch.ops.aten.transpose.int(mul_4, 2, 3)  # f32[2, 2, 2, 6, 3] strides (72, 36, 3, 6, 1)
        reshape_5 = torch.ops.aten.reshape.default(transpose_5, [2, 4, 6, 3])  # f32[2, 4, 6, 3]
        ge = torch.ops.aten.ge.Scalar(to_3, 0)  # bool[2, 1, 6, 3]
        where_4 = torch.ops.aten.where.ScalarOther(ge, reshape_5, -math.inf)  # f32[2, 4, 6, 3]
        amax = torch.ops.aten.amax.default(where_4, [-1], True)  # f32[2, 4, 6, 1]
        eq_2 = torch.ops.aten.eq.Scalar(amax, -math.inf)  # bool[2, 4, 6, 1]
        where_5 = torch.ops.aten.where.ScalarSelf(eq_2, 0.0, amax)  # f32[2, 4, 6, 1]
        sub = torch.ops.aten.sub.Tensor(where_4, where_5)  # f32[2, 4, 6, 3]
        exp = torch.ops.aten.exp.default(sub)  # f32[2, 4, 6, 3]
        sum_2 = torch.ops.aten.sum.dim_IntList(exp, [-1], True)  # f32[2, 4, 6, 1]
        eq_3 = torch.ops.aten.eq.Scalar(sum_2, 0)  # bool[2, 4, 6, 1]
        where_6 = torch.ops.aten.where.ScalarSelf(eq_3, 1.0, sum_2)  # f32[2, 4, 6, 1]
        div = torch.ops.aten.div.Tensor(exp, where_6)  # f32[2, 4, 6, 3]
        to_7 = torch.ops.aten.to.dtype(div, torch.float32)  # f32[2, 4, 6, 3]
        reshape_6 = torch.ops.aten.reshape.default(to_7, [2, 2, 2, 6, 3])  # f32[2, 2, 2, 6, 3]
        transpose_6 = torch.ops.aten.transpose.int(reshape_6, 2, 3)  # f32[2, 2, 6, 2, 3] strides (72, 36, 3, 18, 1)
        matmul_4 = torch.ops.aten.matmul.default(transpose_6, view_9)  # f32[2, 2, 6, 2, 4]
        transpose_7 = torch.ops.aten.transpose.int(matmul_4, 2, 3)  # f32[2, 2, 2, 6, 4] strides (96, 48, 4, 8, 1)
        reshape_7 = torch.ops.aten.reshape.default(transpose_7, [2, 4, 6, 4])  # f32[2, 4, 6, 4]
        permute_default_6 = torch.ops.aten.permute.default(reshape_7, [0, 2, 1, 3])  # f32[2, 6, 4, 4] strides (96, 4, 24, 1)
        clone_default_2 = torch.ops.aten.clone.default(permute_default_6, memory_format=torch.contiguous_format)  # f32[2, 6, 4, 4]
        permute_default_7 = torch.ops.aten.permute.default(clone_default_2, [0, 2, 1, 3])  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        permute_default_4 = torch.ops.aten.permute.default(permute_default_7, [0, 1, 2, 3])  # f32[2, 4, 6, 4] strides (96, 4, 16, 1)
        clone_default_1 = torch.ops.aten.clone.default(permute_default_4, memory_format=torch.contiguous_format)  # f32[2, 4, 6, 4]
        permute_default_5 = torch.ops.aten.permute.default(clone_default_1, [0, 1, 2, 3])  # f32[2, 4, 6, 4]
        # toy.py:22 in forward: weights = (x @ k.mT).softmax(-1)
        m_t = torch.ops.aten.mT.default(repeat_interleave)  # f32[2, 4, 4, 8] strides (128, 32, 1, 4)
        matmul = torch.ops.aten.matmul.default(permute_default_5, m_t)  # f32[2, 4, 6, 8]
        softmax = torch.ops.aten.softmax.int(matmul, -1)  # f32[2, 4, 6, 8]
        # toy.py:23 in forward: return weights @ k, weights
        matmul_1 = torch.ops.aten.matmul.default(softmax, repeat_interleave)  # f32[2, 4, 6, 4]
        return (matmul_1, softmax)
