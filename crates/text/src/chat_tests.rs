use std::time::{Duration, UNIX_EPOCH};

use serde_json::json;

use super::*;

fn template(source: &str) -> ChatTemplate {
    ChatTemplate::new(source.to_owned(), "test".to_owned(), Some("<s>".into()), Some("</s>".into())).unwrap()
}

fn chat(turns: &[(&str, &str)]) -> Vec<ChatMessage> {
    turns.iter().map(|&(role, content)| ChatMessage::new(role, content)).collect()
}

fn render(source: &str, turns: &[(&str, &str)]) -> Result<String, Error> {
    template(source).render(ChatRequest::new(&chat(turns)))
}

/// A template without messages.
fn expression(source: &str) -> String {
    render(source, &[]).unwrap_or_else(|e| format!("error: {e}"))
}

/// As Mixtral's: the system prompt goes into the first user turn; roles must alternate.
const INSTRUCT: &str = r#"
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for m in turns %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate: user/assistant/user/…') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + '\n\n' + m.content + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' ~ m.content ~ ' [/INST]' }}
        {%- endif %}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}
"#;

#[test]
fn a_system_prompt_joins_the_first_turn() {
    let turns = [("system", " Be brief. "), ("user", "1+1?"), ("assistant", " 2 "), ("user", "2+2?")];
    assert_eq!(render(INSTRUCT, &turns).unwrap(), "<s> [INST] Be brief.\n\n1+1? [/INST] 2</s> [INST] 2+2? [/INST]");
    assert_eq!(render(INSTRUCT, &turns[1..2]).unwrap(), "<s> [INST] 1+1? [/INST]");
}

#[test]
fn a_template_can_refuse() {
    let error = render(INSTRUCT, &[("user", "a"), ("user", "b")]).unwrap_err();
    assert!(matches!(&error, Error::TemplateRaised { message, .. } if message.starts_with("roles must alternate")));
    assert!(error.to_string().contains("(test) refuses these messages: roles must"), "{error}");
}

/// What Qwen3's needs: tools, thinking that is kept only after the last real question (found by walking
/// the messages backwards), answers of tools gathered in one turn.
const THINKING: &str = r##"
{%- macro turn(role, text) %}{{ '<' ~ role ~ '>\n' ~ text ~ '</' ~ role ~ '>\n' }}{% endmacro %}
{%- set preamble = messages[0].content + '\n' if messages[0].role == 'system' else '' %}
{%- if tools %}
    {%- set ns = namespace(text=preamble + "# Tools") %}
    {%- for tool in tools %}
        {%- set ns.text = ns.text ~ "\n" ~ (tool | tojson) %}
    {%- endfor %}
    {{- turn('system', ns.text ~ '\n') }}
{%- elif preamble %}
    {{- turn('system', preamble) }}
{%- endif %}
{%- set found = namespace(open=true, question=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- if found.open and message.role == "user" and not (message.content is string and message.content.startswith('[tool]')) %}
        {%- set found.open = false %}
        {%- set found.question = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- turn(message.role, content) }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if thought and loop.index0 > found.question %}
            {%- set content = '<think>\n' + thought.strip('\n') + '\n</think>\n' + content %}
        {%- endif %}
        {%- set ns = namespace(text=content) %}
        {%- for call in message.tool_calls or [] %}
            {%- if call.function %}{% set call = call.function %}{% endif %}
            {%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
            {%- set ns.text = ns.text ~ '[call] ' ~ call.name ~ ' ' ~ arguments ~ '\n' %}
        {%- endfor %}
        {{- turn('assistant', ns.text) }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<user>\n' }}
        {%- endif %}
        {{- '[tool] ' ~ content ~ '\n' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '</user>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think></think>\n' }}
    {%- endif %}
{%- endif %}
"##;

#[test]
fn old_thinking_is_dropped_and_new_thinking_kept() {
    let turns = [
        ("system", "Be brief."),
        ("user", "1+1?"),
        ("assistant", "<think>\neasy\n</think>\n\n2"),
        ("user", "2+2?"),
        ("assistant", "<think>\nhard\n</think>\n\n4"),
    ];
    let messages = chat(&turns);
    let mut request = ChatRequest { add_generation_prompt: false, ..ChatRequest::new(&messages) };
    let all = template(THINKING).render(request).unwrap();
    assert_eq!(
        all,
        "<system>\nBe brief.\n</system>\n<user>\n1+1?</user>\n<assistant>\n2</assistant>\n\
         <user>\n2+2?</user>\n<assistant>\n<think>\nhard\n</think>\n4</assistant>\n"
    );

    let extra = json!({"enable_thinking": false, "messages": [], "add_generation_prompt": false});
    request = ChatRequest { extra: extra.as_object(), ..ChatRequest::new(&messages[1..2]) };
    assert_eq!(
        template(THINKING).render(request).unwrap(),
        "<user>\n1+1?</user>\n<assistant>\n<think></think>\n",
        "a further variable is seen, but replaces none of ours"
    );
}

#[test]
fn tools_are_shown_called_and_answered() {
    let tools = [json!({"type": "function", "function": {"name": "add", "description": "a < b & 'c' é",
        "parameters": {"z": 1, "a": [1.0, null, true], "none": {}}}})];
    let messages: Vec<ChatMessage> = serde_json::from_value(json!([
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": null,
         "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"y": 1, "x": "1"}}}]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "two"},
    ]))
    .unwrap();
    let request = ChatRequest { tools: Some(&tools), ..ChatRequest::new(&messages) };
    assert_eq!(
        template(THINKING).render(request).unwrap(),
        "<system>\n# Tools\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"description\": \
         \"a < b & 'c' é\", \"parameters\": {\"z\": 1, \"a\": [1.0, null, true], \"none\": {}}}}\n</system>\n\
         <user>\n1+1?</user>\n<assistant>\n[call] add {\"y\": 1, \"x\": \"1\"}\n</assistant>\n\
         <user>\n[tool] 2\n[tool] two\n</user>\n<assistant>\n"
    );
}

/// What OLMoE's needs: line breaks after blocks are dropped, those inside strings are kept.
#[test]
fn line_breaks_come_from_strings_alone() {
    let source = "{{ bos_token }}{% for m in messages %}\n{% if m['role'] == 'assistant' %}\n{{ '<A>\\n' + m['content'] + eos_token }}\n{% else %}\n{{ '<' + m['role'][0] | upper + '>\\n' + m['content'] }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<A>' }}\n{% endif %}\n{% endfor %}";
    assert_eq!(
        render(source, &[("user", "U"), ("assistant", "A"), ("user", "V")]).unwrap(),
        "<s><U>\nU\n<A>\nA</s>\n<U>\nV\n<A>\n"
    );
}

/// What DeepSeek's needs: flags in a namespace, system prompts gathered before all turns.
#[test]
fn flags_live_in_a_namespace() {
    let source = r#"
{%- if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif -%}
{%- set ns = namespace(first=true, system='', open=false) -%}
{%- for m in messages if m['role'] == 'system' -%}
    {%- set ns.system = ns.system + ('' if ns.first else '\n\n') + m['content'] -%}
    {%- set ns.first = false -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
    {%- if m['role'] == 'user' -%}
        {%- set ns.open = true -%}{{ '<U>' + m['content'] }}
    {%- endif -%}
    {%- if m['role'] == 'assistant' and m['content'] is not none -%}
        {%- set ns.open = false -%}{{ '<A>' + m['content'].split('</think>')[-1] + '<end>' }}
    {%- endif -%}
{%- endfor -%}
{% if add_generation_prompt and ns.open %}{{ '<A>' }}{% endif %}"#;
    let turns = [("system", "A"), ("system", "B"), ("user", "U"), ("assistant", "x</think>V"), ("user", "W")];
    assert_eq!(render(source, &turns).unwrap(), "<s>A\n\nB<U>U<A>V<end><U>W<A>");
    assert_eq!(render(source, &turns[..4]).unwrap(), "<s>A\n\nB<U>U<A>V<end>");
}

#[test]
fn blocks_are_trimmed_as_in_transformers() {
    assert_eq!(
        render("  {% for m in messages %}\n  {{ m.role }}\n  {% endfor %}\nend\n", &[("a", ""), ("b", "")]).unwrap(),
        "  a\n  b\nend"
    );
}

#[test]
fn loops_break_and_continue() {
    let source = "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}";
    assert_eq!(expression(source), "023");
    assert_eq!(expression("{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{{ twice('ab') }}"), "abab");
}

#[test]
fn python_methods_are_there() {
    for (source, want) in [
        ("{{ ' x '.strip() }}|{{ 'xxa'.lstrip('x') }}|{{ 'a\n'.rstrip() }}", "x|a|a"),
        ("{{ 'a,b,c'.split(',')[-1] }}{{ 'a b'.split()[0] }}", "ca"),
        ("{{ 'aXb'.replace('X', '-') }} {{ 'ab'.upper() }} {{ 'ab c'.title() }}", "a-b AB Ab C"),
        ("{{ {'a': 1}.get('b', 2) }}{% for k, v in {'x': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "2x1a2"),
        ("{{ ', '.join(['a', 'b']) }} {{ ['a', 'b'] | join(';') }}", "a, b a;b"),
        ("{{ 'abc'[1:] }}{{ 'abc'[::-1] }}{{ [1, 2, 3][:-1] | length }}", "bccba2"),
        ("{{ None is none }}{{ 'x' is string }}{{ {} is mapping }}{{ nope is defined }}", "TrueTrueTrueFalse"),
        ("{{ bos_token is defined and documents is none }}", "True"),
        ("{{ [{'r': 'a'}, {'r': 'b'}] | selectattr('r', 'equalto', 'b') | list | length }}", "1"),
        ("{{ 7 // 2 }} {{ 7 % 4 }} {{ 1 if false else 2 }} {{ nope }}", "3 3 2 "),
    ] {
        assert_eq!(expression(source).to_lowercase(), want.to_lowercase(), "{source}");
    }
}

#[test]
fn tojson_is_pythons() {
    let value = r#"{% set v = {"b": "é<'&\n\u0001", "a": [1, 2.0, {}, []]} %}"#;
    for (arguments, want) in [
        ("", "{\"b\": \"é<'&\\n\\u0001\", \"a\": [1, 2.0, {}, []]}"),
        ("(ensure_ascii=True, sort_keys=True)", "{\"a\": [1, 2.0, {}, []], \"b\": \"\\u00e9<'&\\n\\u0001\"}"),
        ("(separators=(',', ':'))", "{\"b\":\"é<'&\\n\\u0001\",\"a\":[1,2.0,{},[]]}"),
        ("(indent=2)", "{\n  \"b\": \"é<'&\\n\\u0001\",\n  \"a\": [\n    1,\n    2.0,\n    {},\n    []\n  ]\n}"),
    ] {
        let value = value.replace("\\u0001", "\u{1}");
        assert_eq!(expression(&format!("{value}{{{{ v | tojson{arguments} }}}}")), want);
    }
    assert!(expression("{{ nope | tojson }}").contains("undefined"));
    assert!(expression("{{ 1 | tojson(indent=1000000000) }}").contains("at most 64"));
}

#[test]
fn the_date_is_given() {
    let messages = chat(&[("user", "hi")]);
    let now = UNIX_EPOCH + Duration::from_secs(1_735_689_599);
    let request = ChatRequest { now, ..ChatRequest::new(&messages) };
    assert_eq!(template("{{ strftime_now('%d %b %Y') }}").render(request).unwrap(), "31 Dec 2024");
    assert!(expression("{{ strftime_now('%Q') }}").contains("%Q is not known"));
}

#[test]
fn generation_tags_write_nothing() {
    let source = "{% for m in messages %}{%- generation -%} {{ m.content }} {%- endgeneration +%}{{ add_generation_prompt }}{% endfor %}";
    assert_eq!(render(source, &[("a", "x")]).unwrap().to_lowercase(), "xtrue");
}

#[test]
fn parts_are_given_as_parts_or_as_text() {
    let parts: Content =
        serde_json::from_value(json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).unwrap();
    assert_eq!(parts.text().unwrap(), "a\nb");
    let messages = [ChatMessage::new("user", parts)];
    let source = "{% for p in messages[0].content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}";
    assert_eq!(template(source).render(ChatRequest::new(&messages)).unwrap(), "ab");
    let image = Content::Parts(vec![json!({"type": "image_url"})]);
    assert!(image.text().unwrap_err().to_string().contains("part 0 has the type \"image_url\""));
    assert_eq!(serde_json::from_value::<ChatMessage>(json!({"role": "a"})).unwrap().content, Content::None);
}

#[test]
fn a_template_is_stopped_in_its_box() {
    let endless = "{% for i in range(100000) %}{% for j in range(100000) %}{% set x = i %}{% endfor %}{% endfor %}";
    assert!(matches!(render(endless, &[]), Err(Error::TemplateEndless { .. })));
    let long = "{% set x = 'a' * 1000000 %}{% for i in range(100) %}{{ x }}{% endfor %}";
    assert!(matches!(render(long, &[]), Err(Error::TemplateOutput { .. })));
    let recursive = "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}";
    assert!(matches!(render(recursive, &[]), Err(Error::TemplateFailed { .. })));
    let endless_include = format!("{{% include '{NAME}' %}}");
    assert!(matches!(render(&endless_include, &[]), Err(Error::TemplateFailed { .. })));
    for file in ["/etc/hostname", "other"] {
        assert!(matches!(render(&format!("{{% include '{file}' %}}"), &[]), Err(Error::TemplateFailed { .. })));
    }
}

/// Each of these would overflow an ordinary stack: the engine recurses over operators and values.
#[test]
fn deep_templates_overflow_no_stack() {
    for operator in ["+1", ".a", "|trim"] {
        let source = format!("{{{{ 1{} }}}}", operator.repeat(crate::MAX_TEMPLATE_BYTES as usize / operator.len() - 9));
        let _ = ChatTemplate::new(source, "test".into(), None, None).map(|t| t.render(ChatRequest::new(&[])));
    }
    let source = format!("{{{{ {}1 }}}}", "-".repeat(crate::MAX_TEMPLATE_BYTES as usize - 9));
    let _ = ChatTemplate::new(source, "test".into(), None, None);
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(80000) %}{% set ns.x = [[[[ns.x]]]] %}{% endfor %}";
    for end in ["{{ ns.x }}", "{{ ns.x | tojson }}"] {
        let text = render(&format!("{deep}{end}"), &[]).unwrap();
        assert_eq!(text.chars().filter(|&c| c == '[').count(), 4 * 80_000 + 1);
    }
}

#[test]
fn errors_name_the_line() {
    let bad = ChatTemplate::new("one\n{% if %}".into(), "test".into(), None, None).unwrap_err().to_string();
    assert!(bad.contains("cannot be parsed: line 2"), "{bad}");
    let missing = render("one\n{{ messages[0].content.nope.nope }}", &[("user", "hi")]).unwrap_err().to_string();
    assert!(missing.contains("failed: line 2"), "{missing}");
}
