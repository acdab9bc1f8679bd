//! The page: a table and charts in one HTML file, or the charts alone in one SVG.
//!
//! Neither loads anything: no script, no style, no font from elsewhere. Colours follow the reader's light or dark theme.

use std::fmt::Write;

use engine::metrics::history::{DamagedLine, Run};

use super::chart::{COLORS, COLORS_DARK, Chart, HEIGHT, WIDTH, escape, sample, text};
use super::table::Table;

/// What goes on a page.
#[derive(Debug)]
pub(super) struct Page<'a> {
    pub(super) title: &'a str,
    pub(super) runs: &'a [Run],
    /// What the runs are called, each its own name.
    pub(super) names: &'a [String],
    pub(super) table: &'a Table,
    pub(super) charts: &'a [Chart<'a>],
    pub(super) damaged: &'a [DamagedLine],
    pub(super) damaged_lines: u64,
    pub(super) smooth: f64,
}

const FONT: &str = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif";
/// Damaged lines that are listed.
const LISTED: usize = 20;
/// Charts side by side in an SVG.
const COLUMNS: usize = 2;

impl Page<'_> {
    /// The page as HTML.
    pub(super) fn html(&self) -> String {
        let title = escape(self.title);
        let mut out = format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <title>{title}</title>\n<style>\n{}{}</style>\n</head>\n<body>\n<h1>{title}</h1>\n",
            page_style(),
            chart_style()
        );
        out += &self.table_html();
        if self.smooth > 0.0 {
            let _ = writeln!(
                out,
                "<p class=\"note\">Where a curve is pale, the strong one is its moving average (weight {} for the past).</p>",
                self.smooth
            );
        }
        out += &self.legend();
        out.push_str("<main>\n");
        for chart in self.charts {
            let _ = writeln!(
                out,
                "<figure><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{}\">{}</svg></figure>",
                escape(chart.title),
                chart.group(self.smooth)
            );
        }
        out.push_str("</main>\n");
        out += &self.damage_html();
        let _ = writeln!(out, "<footer>lapidary report {}</footer>", env!("CARGO_PKG_VERSION"));
        out.push_str("</body>\n</html>\n");
        out
    }

    fn table_html(&self) -> String {
        let mut out = String::from("<div class=\"wide\"><table>\n<thead><tr><th></th>");
        for (i, run) in self.runs.iter().enumerate() {
            let path = escape(&run.path.display().to_string());
            let _ = write!(out, "<th title=\"{path}\">{}</th>", self.key(i));
        }
        out.push_str("</tr></thead>\n<tbody>\n");
        for (label, cells) in &self.table.rows {
            let _ = write!(out, "<tr><th>{}</th>", escape(label));
            for cell in cells {
                let _ = write!(out, "<td>{}</td>", escape(cell));
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</tbody></table></div>\n");
        out
    }

    /// A run's line and name.
    fn key(&self, run: usize) -> String {
        format!(
            "<svg class=\"key\" viewBox=\"0 0 24 10\" width=\"24\" height=\"10\">{}</svg> {}",
            sample(run, (1.0, 5.0)),
            escape(&self.names[run])
        )
    }

    /// The names once more: the table may be wider than the window, and out of sight.
    fn legend(&self) -> String {
        if self.names.len() < 2 {
            return String::new();
        }
        let names: String = (0..self.names.len()).map(|i| format!("<span>{}</span>", self.key(i))).collect();
        format!("<p class=\"legend\">{names}</p>\n")
    }

    fn damage_html(&self) -> String {
        if self.damaged_lines == 0 {
            return String::new();
        }
        let mut out =
            format!("<section class=\"note\"><p>Lines that could not be read: {}</p><ul>\n", self.damaged_lines);
        for d in self.damaged.iter().take(LISTED) {
            let _ =
                writeln!(out, "<li>{}:{}: {}</li>", escape(&d.path.display().to_string()), d.line, escape(&d.reason));
        }
        if self.damaged_lines > LISTED as u64 {
            out.push_str("<li>and more</li>\n");
        }
        out.push_str("</ul></section>\n");
        out
    }

    /// The charts as one SVG, with a legend.
    pub(super) fn svg(&self) -> String {
        let columns = self.charts.len().clamp(1, COLUMNS);
        let rows = self.charts.len().div_ceil(columns);
        let head = 44.0 + 20.0 * self.names.len() as f64;
        let (width, height) = (columns as f64 * WIDTH, head + rows as f64 * HEIGHT);
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             height=\"{height}\" font-family=\"{FONT}\">\n<title>{}</title>\n<style>{}\
             @media (prefers-color-scheme: dark) {{ .paper {{ fill: #16181c }} }}</style>\n\
             <rect class=\"paper\" fill=\"#ffffff\" width=\"{width}\" height=\"{height}\"/>\n",
            escape(self.title),
            chart_style()
        );
        text(&mut out, (20.0, 26.0), "start", "title", self.title);
        for (i, name) in self.names.iter().enumerate() {
            let top = 46.0 + 20.0 * i as f64;
            out += &sample(i, (20.0, top - 4.0));
            text(&mut out, (50.0, top), "start", "tick", name);
        }
        out.push('\n');
        for (i, chart) in self.charts.iter().enumerate() {
            let (left, top) = ((i % columns) as f64 * WIDTH, head + (i / columns) as f64 * HEIGHT);
            let _ = writeln!(out, "<g transform=\"translate({left} {top})\">{}</g>", chart.group(self.smooth));
        }
        out.push_str("</svg>\n");
        out
    }
}

fn page_style() -> String {
    format!(
        "body {{ font: 15px/1.45 {FONT}; margin: 24px auto; padding: 0 20px; max-width: 1400px; color: #1b1b1b; \
         background: #fff }}\n\
         h1 {{ font-size: 22px; margin: 0 0 14px }}\n\
         .wide {{ overflow-x: auto }}\n\
         table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }}\n\
         th, td {{ padding: 2px 22px 2px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3 }}\n\
         tbody th {{ text-align: left; font-weight: 400; color: #5a5a5a }}\n\
         thead th {{ font-weight: 600 }}\n\
         .legend {{ position: sticky; top: 0; padding: 6px 0; margin: 14px 0 0; background: inherit; font-size: 13px; \
         z-index: 1 }}\n\
         .legend span {{ margin-right: 20px; white-space: nowrap; display: inline-block }}\n\
         .key {{ vertical-align: middle }}\n\
         main {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 18px; \
         margin-top: 12px }}\n\
         figure {{ margin: 0 }}\n\
         figure svg {{ width: 100%; height: auto; display: block; max-width: 900px }}\n\
         .note, footer {{ color: #5a5a5a; font-size: 13px }}\n\
         footer {{ margin-top: 24px }}\n\
         @media (prefers-color-scheme: dark) {{ body {{ color: #e8e8e8; background: #16181c }}\n\
         th, td {{ border-color: #33373d }} tbody th, .note, footer {{ color: #a8adb5 }} }}\n"
    )
}

/// What the charts' attributes cannot say: their colours on dark ground.
fn chart_style() -> String {
    let mut out = String::from(
        "@media (prefers-color-scheme: dark) { .grid { stroke: #2b2f35 } .axis { stroke: #7b828c } \
         text.title { fill: #e8e8e8 } text.tick { fill: #a8adb5 }",
    );
    for (i, color) in COLORS_DARK.iter().enumerate().take(COLORS.len()) {
        let _ = write!(out, " .r{i} .l {{ stroke: {color} }} .r{i} .d {{ fill: {color} }}");
    }
    out.push_str(" }\n");
    out
}
