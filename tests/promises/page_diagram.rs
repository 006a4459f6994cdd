//! The README's diagram can be drawn, and has as many round trips as are counted.

use crate::round_trips::STOCK_ROUND_TRIPS;
use crate::support::page::{blocks, page};
use regex::Regex;

/// Mermaid draws nothing at all if it cannot read one line.
#[test]
fn its_diagram_can_be_drawn_and_has_as_many_round_trips_as_are_counted() {
    let readme = page("README.md");
    let diagrams = blocks(&readme);
    let mut diagrams = diagrams.iter().filter(|block| block.kind == "mermaid");
    let diagram = diagrams.next().expect("a block ```mermaid in README.md");
    let lines: Vec<_> = (diagram.line + 1..).zip(diagram.code.lines()).collect();
    assert_eq!(
        lines[0].1, "sequenceDiagram",
        "README.md:{}: the diagram is to be one of this kind",
        lines[0].0
    );
    let form =
        r"^    (Program->>PostgreSQL|PostgreSQL-->>Program|Note over Program,PostgreSQL): [^;#]+$";
    let form = Regex::new(form).unwrap();
    for (number, line) in &lines[1..] {
        assert!(
            form.is_match(line),
            "README.md:{number}: write an arrow or a note, without `;` and `#`, at which Mermaid ends: {line}"
        );
    }
    let is_asked = |(_, line): &&(usize, &str)| line.contains("->>PostgreSQL:");
    let asked: Vec<_> = lines.iter().filter(is_asked).collect();
    let trips = STOCK_ROUND_TRIPS;
    assert_eq!(
        asked.len(),
        trips,
        "README.md:{}: as many round trips are drawn on the left as are counted on the right",
        diagram.line
    );
    for (nth, (number, line)) in asked.iter().enumerate() {
        let start = format!("PostgreSQL: {}. ", nth + 1);
        assert!(
            line.contains(&start),
            "README.md:{number}: should have {start:?}"
        );
    }
    let answers = diagram.code.matches("-->>Program:").count();
    assert_eq!(
        answers, trips,
        "README.md:{}: each question has one answer",
        diagram.line
    );
    let sentence = "A run takes seven round trips with TLS 1.3, and eight with TLS 1.2";
    assert!(
        readme.contains(sentence),
        "README.md: no sentence {sentence:?}, which tests/promises/round_trips.rs counts: correct both"
    );
}
