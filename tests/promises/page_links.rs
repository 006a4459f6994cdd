//! Links of the pages lead somewhere: to a file, to a heading of this page or another, or to another site.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Component, Path, PathBuf};

use crate::support::page::{PAGES, lines, page};
use regex::Regex;

/// The anchors that GitHub gives to the headings of a page.
fn anchors(path: &str) -> BTreeSet<String> {
    let page = page(path);
    let mut seen = BTreeMap::<String, usize>::new();
    let mut anchors = BTreeSet::new();
    for line in lines(&page) {
        if line.is_code || !line.text.starts_with('#') {
            continue;
        }
        let heading = line.text.trim_start_matches('#').trim().to_lowercase();
        let kept = |c: char| c.is_alphanumeric() || c == '-' || c == '_' || c == ' ';
        let anchor: String = heading.chars().filter(|c| kept(*c)).collect();
        let anchor = anchor.replace(' ', "-");
        // The second heading with the same words has a number.
        let count = seen.entry(anchor.clone()).or_default();
        anchors.insert(match *count {
            0 => anchor,
            nth => format!("{anchor}-{nth}"),
        });
        *count += 1;
    }
    anchors
}

/// The path from the project to what a page links to, without `..`.
fn resolved(from: &str, to: &str) -> PathBuf {
    let folder = Path::new(from).parent().unwrap();
    let mut path = PathBuf::new();
    for part in folder.join(to).components() {
        match part {
            Component::ParentDir => assert!(path.pop(), "{from}: {to} leads out of the project"),
            part => path.push(part),
        }
    }
    path
}

#[test]
fn their_links_lead_somewhere() {
    let link = Regex::new(r"\]\(([^)]+)\)").unwrap();
    let mut broken = String::new();
    for path in PAGES {
        let text = page(path);
        for line in lines(&text).iter().filter(|line| !line.is_code) {
            let targets = link.captures_iter(line.text).map(|found| found.extract().1);
            for [target] in targets {
                let (file, anchor) = target.split_once('#').unwrap_or((target, ""));
                let file = match file {
                    "" => PathBuf::from(path),
                    file => resolved(path, file),
                };
                let what_to_do = if target.starts_with("https://") {
                    continue;
                } else if !fs::exists(&file).unwrap() {
                    format!("there is no file {}", file.display())
                } else if anchor.is_empty() {
                    continue;
                } else {
                    let file = file.to_str().unwrap();
                    let anchors = anchors(file);
                    if anchors.contains(anchor) {
                        continue;
                    }
                    format!("{file} has no such heading; it has {anchors:?}")
                };
                let line = line.number;
                broken += &format!("{path}:{line}: correct the link to {target}: {what_to_do}\n");
            }
        }
    }
    assert!(broken.is_empty(), "{broken}");
}
