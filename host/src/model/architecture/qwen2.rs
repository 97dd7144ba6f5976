//! Qwen2: Llama's names, and a bias on query, key and value (which
//! [`Architecture::has_qkv_bias`](crate::model::Architecture::has_qkv_bias) announces).

use super::{Role, llama};

pub(super) fn tensor_name(role: Role) -> String {
    llama::tensor_name(role)
}
