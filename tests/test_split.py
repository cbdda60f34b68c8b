"""Where an answer begins, if it looks like the end of the prompt."""

import pytest

import train_model

# The prompt opens a thought, which a finished turn lacks.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>' }}{% endif %}"
)


@pytest.mark.parametrize("answer", ["<3 to you", "<t", "<", "hello", "<think aloud", "hi", "<|im_start|>assistant"])
def test_an_answer_that_begins_like_the_end_of_the_prompt_keeps_its_first_letters(answer, llama_folder):
    tokenizer = train_model.load_tokenizer(llama_folder)
    tokenizer.chat_template = THINKS
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
    full = train_model.render(tokenizer, talk)
    prompt, rest = train_model.split_at_answer(tokenizer, talk, full)
    assert prompt.endswith("assistant\n<think>")
    assert rest == train_model.break_control_tokens(answer, tokenizer) + "<|im_end|>\n"
