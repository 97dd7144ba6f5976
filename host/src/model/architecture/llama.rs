//! Llama: the names that most later families took over.

use super::{LayerRole, Role};

pub(super) fn tensor_name(role: Role) -> String {
    match role {
        Role::Embedding => "model.embed_tokens.weight".into(),
        Role::FinalNorm => "model.norm.weight".into(),
        Role::Head => "lm_head.weight".into(),
        Role::Layer(layer, role) => format!("model.layers.{layer}.{}", layer_tensor_name(role)),
    }
}

fn layer_tensor_name(role: LayerRole) -> &'static str {
    match role {
        LayerRole::InputNorm => "input_layernorm.weight",
        LayerRole::Query => "self_attn.q_proj.weight",
        LayerRole::Key => "self_attn.k_proj.weight",
        LayerRole::Value => "self_attn.v_proj.weight",
        LayerRole::QueryBias => "self_attn.q_proj.bias",
        LayerRole::KeyBias => "self_attn.k_proj.bias",
        LayerRole::ValueBias => "self_attn.v_proj.bias",
        LayerRole::Output => "self_attn.o_proj.weight",
        LayerRole::PostNorm => "post_attention_layernorm.weight",
        LayerRole::Gate => "mlp.gate_proj.weight",
        LayerRole::Up => "mlp.up_proj.weight",
        LayerRole::Down => "mlp.down_proj.weight",
    }
}
