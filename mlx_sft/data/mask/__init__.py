"""Which characters of a rendered conversation the model is trained on: what it must write itself when it is used.

    ↵ is a line break      <|im_start|>user↵How?<|im_end|>↵<|im_start|>assistant↵⟦So.<|im_end|>⟧↵

A template writes a conversation as it likes: it rewrites history, merges tool responses, adds headers. So the supervised spans are
not searched for in the text. The template is traced while it writes, and each character of the text has its message. A turn starts
after its header, which the generation prompt supplies, and its output ends with the end-of-turn token:

    text                   <|im_start|>user↵How?<|im_end|>↵<|im_start|>assistant↵So.<|im_end|>↵
    char_to_message        00000000000000000000000000000000111111111111111111111111111111111111
    letter_to_message      .................000..................................11............
    header                                                 ----------------------
    output                                                                       =============

Nothing is guessed. What is traced is the rendering of a copy in which every letter of a message is replaced by its probe letter. Its
text must equal the tokenizer's own rendering of the conversation in all but these letters, and must show every assistant's letters
inside its own turn and all others outside. Where the template's author tagged what is generated, the tags say it. Where no way of
tracing is free of contradictions, the conversation is refused.

    reference_rendering        the tokenizer's own text, its beginnings, and the prompts before its turns
    traced_template, trace     the template with calls put in that print a private marker wherever another message begins
    probes                     letters by which a message is known where it is written; every way of tracing, the plainest first
    headers, reasoning         where a turn starts
    assistant_spans            where it ends  →  the spans; those of the template's own tags, where it has them

`chat_template.render` puts them together.
"""
