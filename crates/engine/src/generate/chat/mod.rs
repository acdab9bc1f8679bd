//! Conversations: from messages to a prompt by the checkpoint's own template, and from the model's tokens to an answer.

mod python;
mod response;
mod template;
mod tool_call;

pub use response::{Part, Response, ResponseStream};
pub use template::{ChatTemplate, Conversation};
pub use tool_call::{ToolCall, ToolCallError, format_arguments};
