//! `tests/text/chat_template.jinja` is written from a description of Gemma 4's chat format (Google's own template is not part of this
//! project); what it must give is that description's known answers.

use super::*;

const GEMMA: &str = include_str!("../../../../../tests/text/chat_template.jinja");

fn template(text: &str) -> Result<ChatTemplate, GenerateError> {
    let tokens = json!({"bos_token": "<bos>"}).as_object().unwrap().clone();
    ChatTemplate::new(PathBuf::from("chat_template.jinja"), text, None, tokens)
}

fn render(text: &str, conversation: &Conversation) -> Result<String, GenerateError> {
    template(text)?.render(conversation, true)
}

fn messages(messages: Json) -> Conversation {
    Conversation { messages: messages.as_array().unwrap().clone(), ..Conversation::default() }
}

#[test]
fn the_known_answer() {
    let conversation = messages(json!([
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]));
    let text = render(GEMMA, &conversation).unwrap();
    assert_eq!(
        text,
        "<bos><|turn>user\nWhat is the capital of France?<turn|>\n<|turn>model\nThe capital of France is Paris.<turn|>\n<|turn>model\n"
    );
    let without = template(GEMMA).unwrap().render(&conversation, false).unwrap();
    assert_eq!(text.strip_suffix("<|turn>model\n"), Some(without.as_str()));
    // Its token ids need Gemma 4's own tokenizer, which a user of the project has and the project does not.
    let Some(path) = std::env::var_os("LAPIDARY_GEMMA4_TOKENIZER") else { return };
    let tokenizer = crate::data::Tokenizer::from_path(Path::new(&path)).unwrap();
    assert_eq!(
        crate::generate::encode_written(&tokenizer, &text).unwrap(),
        [
            2, 105, 2364, 107, 3689, 563, 506, 5279, 529, 7001, 236_881, 106, 107, 105, 4368, 107, 818, 5279, 529,
            7001, 563, 9079, 236_761, 106, 107, 105, 4368, 107
        ]
    );
    let prompt = crate::generate::encode_text(&tokenizer, "The capital of France is").unwrap();
    assert_eq!(prompt, [2, 818, 5279, 529, 7001, 563]);
}

#[test]
fn instructions_thinking_and_tools_come_first() {
    let mut conversation = Conversation::ask(Some("  Be brief.\n"), " Hi \n");
    assert_eq!(
        render(GEMMA, &conversation).unwrap(),
        "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    );
    conversation.enable_thinking = Some(true);
    conversation.tools = vec![json!({"type": "function", "function": {
        "name": "get_weather", "description": "Tells \"it\" <all>.",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "unit": {"type": "string", "enum": ["C", "F"], "description": "Unit."},
            "city": {"type": "string", "description": "City."}}}}})];
    assert_eq!(
        render(GEMMA, &conversation).unwrap(),
        "<bos><|turn>system\n<|think|>\nBe brief.<|tool>declaration:get_weather{description:<|\"|>Tells \"it\" <all>.<|\"|>,\
         parameters:{properties:{city:{description:<|\"|>City.<|\"|>,type:<|\"|>STRING<|\"|>},unit:{description:<|\"|>Unit.<|\"|>,\
         enum:[<|\"|>C<|\"|>,<|\"|>F<|\"|>],type:<|\"|>STRING<|\"|>}},required:[<|\"|>city<|\"|>],type:<|\"|>OBJECT<|\"|>}}<tool|>\
         <turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    );
    let only_thinking = Conversation { enable_thinking: Some(true), ..Conversation::ask(None, "Hi") };
    assert_eq!(
        render(GEMMA, &only_thinking).unwrap(),
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    );
}

#[test]
fn calls_and_results_stay_in_one_turn() {
    let call = json!({"role": "assistant", "content": "", "reasoning": "I need it.", "tool_calls": [
        {"type": "function", "function": {"name": "look", "arguments": {"n": 2, "at": "a", "all": true, "in": [1.5, null]}}}]});
    let waiting = messages(json!([{"role": "user", "content": "Look."}, call]));
    let begin = "<bos><|turn>user\nLook.<turn|>\n<|turn>model\n<|channel>thought\nI need it.\n<channel|>\
                 <|tool_call>call:look{all:true,at:<|\"|>a<|\"|>,in:[1.5,null],n:2}<tool_call|><|tool_response>";
    assert_eq!(render(GEMMA, &waiting).unwrap(), begin);
    let mut with_result = waiting.clone();
    with_result.messages.push(json!({"role": "tool", "name": "look", "content": {"seen": "it"}}));
    let middle = format!("{begin}response:look{{seen:<|\"|>it<|\"|>}}<tool_response|>");
    assert_eq!(render(GEMMA, &with_result).unwrap(), middle);
    // A thought is history after the next question; so is one in the text.
    with_result.push("assistant", "<|channel>thought\nhm<channel|>Seen.");
    with_result.push("user", "Thanks.");
    assert_eq!(
        render(GEMMA, &with_result).unwrap(),
        middle.replace("<|channel>thought\nI need it.\n<channel|>", "")
            + "Seen.<turn|>\n<|turn>user\nThanks.<turn|>\n<|turn>model\n"
    );
}

#[test]
fn a_refusal_is_an_error() {
    let error = render(GEMMA, &messages(json!([{"role": "nobody", "content": "x"}]))).unwrap_err().to_string();
    assert!(error.starts_with("the chat template: ") && error.contains("no such role: nobody"), "{error}");
}

#[test]
fn blocks_are_trimmed_as_in_transformers() {
    // What jinja2 gives with trim_blocks and lstrip_blocks, and without the last line feed.
    let text = "a\n  {% if true %}\n  b\n    {%- if true %}\nc{% endif %}\n  {% endif %}\n{# x #}\n  {{ 1.0 }} {{ none }} {{ true }} {{ ['x', {'y': 1}] }}{{ missing }}\n";
    assert_eq!(render(text, &Conversation::default()).unwrap(), "a\n  bc  1.0 None True ['x', {'y': 1}]");
    assert_eq!(render("{{ bos_token }}\n\n", &Conversation::default()).unwrap(), "<bos>\n");
    let marked = "{% for m in messages %}\n{%- generation -%}\n x {{ m.content }}\n{%- endgeneration %}\n{% endfor %}";
    assert_eq!(render(marked, &messages(json!([{"content": "1"}, {"content": "2"}]))).unwrap(), "x 1x 2");
}

#[test]
fn helpers_are_there() {
    let text = "{{ strftime_now('%Y') }} {{ '{\"a\": [1, \"<é>\"]}' == ({'a': [1, '<é>']} | tojson) }} {{ 'a,b'.split(',')[1].upper() }} \
                {{ {'x': 1}.get('y', 'no') }} {% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}";
    let out = render(text, &Conversation::default()).unwrap();
    assert_eq!(out.split_once(' ').unwrap().1, "True B no 13");
    assert_eq!(out.split_once(' ').unwrap().0.len(), 4);
    let error = |text: &str| render(text, &Conversation::default()).unwrap_err().to_string();
    assert!(error("{{ raise_exception('not so') }}").contains("not so"));
    assert!(error("{{ strftime_now('%!') }}").contains("strftime_now"));
    assert!(error("a\n{{ nothing.at.all }}").contains("line 2"));
    assert!(error("{% if").contains("chat_template.jinja: no chat template"));
    // Endless templates end.
    assert!(error("{% for i in range(50000) %}{% for j in range(50000) %}{% endfor %}{% endfor %}").contains("fuel"));
    assert!(error("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").contains("recursion"));
}

#[test]
fn reasoning_has_every_name() {
    let text = "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }};{% endfor %}";
    let all = messages(json!([{"reasoning": "a"}, {"thinking": "b"}, {"reasoning_content": "c"}, {"content": "x"}]));
    assert_eq!(render(text, &all).unwrap(), "a/a;b/b;c/c;/;");
}

#[test]
fn files_are_found_in_the_order_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(path, text).unwrap();
    };
    let with = |given: Option<&Path>, tools: usize| {
        let template = ChatTemplate::open(dir.path(), given).unwrap()?;
        let conversation = Conversation { tools: vec![json!({}); tools], ..Conversation::default() };
        Some(template.render(&conversation, false).unwrap())
    };
    assert_eq!(with(None, 0), None);
    write("tokenizer_config.json", r#"{"bos_token": {"content": "[B]"}, "eos_token": "[E]", "chat_template": null}"#);
    assert_eq!(with(None, 0), None);
    write(
        "tokenizer_config.json",
        r#"{"bos_token": {"content": "[B]"}, "chat_template": [{"name": "default", "template": "1{{ bos_token }}{{ eos_token }}"},
            {"name": "tool_use", "template": "t"}]}"#,
    );
    assert_eq!((with(None, 0).unwrap(), with(None, 1).unwrap()), ("1[B]<eos>".to_owned(), "t".to_owned()));
    write("chat_template.json", r#"{"chat_template": "2"}"#);
    assert_eq!(with(None, 0).unwrap(), "2");
    write("chat_template.jinja", "3");
    assert_eq!(with(None, 1).unwrap(), "3");
    write("additional_chat_templates/tool_use.jinja", "3t");
    assert_eq!((with(None, 0).unwrap(), with(None, 1).unwrap()), ("3".to_owned(), "3t".to_owned()));
    write("other", "4");
    assert_eq!(with(Some(&dir.path().join("other")), 1).unwrap(), "4");
    assert!(ChatTemplate::open(dir.path(), Some(&dir.path().join("absent"))).is_err());
    write("chat_template.jinja", "{{");
    assert!(ChatTemplate::open(dir.path(), None).unwrap_err().to_string().contains("chat_template.jinja"));
}
