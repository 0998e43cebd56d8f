//! Strings of a report. Most of what a report quotes was written by the guest, and a guest is hostile: its strings are
//! cleaned once, on their way in ([`clean_all`]), and escaped by each format on their way out.

use std::borrow::Cow;

use serde_json::Value;

/// Longest string that a report takes over, in characters. QEMU's command line is the longest honest one.
const LONGEST: usize = 16_384;

/// Characters that no reader sees, or that change how others are shown: controls but for tab and line feed, and what
/// Unicode calls bidirectional and invisible formatting ("Trojan Source", CVE-2021-42574).
fn is_hidden(c: char) -> bool {
    match c {
        '\n' | '\t' => false,
        '\u{200b}'..='\u{200f}'
        | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}'
        | '\u{feff}'
        | '\u{fff9}'..='\u{fffd}'
        | '\u{fffe}'..='\u{ffff}'
        | '\u{e0000}'..='\u{e007f}' => true,
        c => c.is_control(),
    }
}

/// A string with everything visible: hidden characters as `\u{1b}`, and an end where it is too long to be honest.
#[must_use]
pub fn clean(text: &str) -> Cow<'_, str> {
    let too_long = text.len() > LONGEST && text.char_indices().nth(LONGEST).is_some();
    if !too_long && !text.chars().any(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut clean = String::with_capacity(text.len().min(LONGEST));
    for c in text.chars().take(LONGEST) {
        if is_hidden(c) {
            clean.extend(c.escape_unicode());
        } else {
            clean.push(c);
        }
    }
    if too_long {
        clean.push('…');
    }
    Cow::Owned(clean)
}

/// Cleans every string of a record, names of fields included.
pub fn clean_all(value: &mut Value) {
    match value {
        Value::String(text) => {
            if let Cow::Owned(cleaned) = clean(text) {
                *text = cleaned;
            }
        }
        Value::Array(items) => items.iter_mut().for_each(clean_all),
        Value::Object(fields) => {
            if fields.keys().any(|name| matches!(clean(name), Cow::Owned(_))) {
                *fields = std::mem::take(fields)
                    .into_iter()
                    .map(|(name, value)| (clean(&name).into_owned(), value))
                    .collect();
            }
            fields.values_mut().for_each(clean_all);
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// In one line, for formats in which a line is a statement.
#[must_use]
pub fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// In one line and no longer than this many characters.
#[must_use]
pub fn cut(text: &str, longest: usize) -> String {
    let line = one_line(text);
    match line.char_indices().nth(longest) {
        None => line,
        Some(_) => line.chars().take(longest.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// In ASCII, for mails: what this project writes is spelt out, the rest shows its code point.
#[must_use]
pub fn ascii(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '←' => plain.push_str("<-"),
            '→' => plain.push_str("->"),
            '–' | '—' => plain.push('-'),
            '…' => plain.push_str("..."),
            '×' => plain.push('x'),
            '≥' => plain.push_str(">="),
            '≤' => plain.push_str("<="),
            '“' | '”' => plain.push('"'),
            '‘' | '’' => plain.push('\''),
            'µ' => plain.push('u'),
            '\u{a0}' | '\u{202f}' => plain.push(' '),
            c if c.is_ascii() => plain.push(c),
            c => plain.extend(c.escape_unicode()),
        }
    }
    Cow::Owned(plain)
}

/// A word of a shell, quoted if it has to be.
#[must_use]
pub fn shell(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-+=./,:@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        Cow::Borrowed(word)
    } else {
        Cow::Owned(format!("'{}'", word.replace('\'', "'\\''")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_hides_in_a_clean_string() {
        assert!(matches!(clean("BUG: soft lockup\n\tin ünïcödé ←"), Cow::Borrowed(_)));
        assert_eq!(clean("\x1b[2Jgone\x07"), "\\u{1b}[2Jgone\\u{7}");
        assert_eq!(clean("a\u{202e}b\u{2066}c"), "a\\u{202e}b\\u{2066}c");
        assert_eq!(clean("\r\n\0"), "\\u{d}\n\\u{0}");
        assert_eq!(clean(&"x".repeat(LONGEST + 5)).chars().count(), LONGEST + 1);
    }

    #[test]
    fn a_record_is_cleaned_to_its_leaves() {
        let mut value = serde_json::json!({ "a\u{7}": ["x\u{1b}", { "b": "\u{200b}" }], "n": 1 });
        clean_all(&mut value);
        assert_eq!(value, serde_json::json!({ "a\\u{7}": ["x\\u{1b}", { "b": "\\u{200b}" }], "n": 1 }));
    }

    #[test]
    fn lines_words_and_ascii() {
        assert_eq!(one_line(" a\n b\tc "), "a b c");
        assert_eq!(cut("one two three", 8), "one two…");
        assert_eq!(ascii("a ← b … 10 µs ☠"), "a <- b ... 10 us \\u{2620}");
        assert_eq!(shell("drain-livelock"), "drain-livelock");
        assert_eq!(shell("it's"), "'it'\\''s'");
        assert_eq!(shell("$(reboot)"), "'$(reboot)'");
    }
}
