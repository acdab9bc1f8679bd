//! Curves as SVG.
//!
//! Every shape carries its colours as attributes, so that any viewer shows it; a style sheet may change them by class.

use std::fmt::Write;

use super::scale::{self, Axis, Unit};

/// A chart of one quantity over steps.
#[derive(Debug)]
pub(super) struct Chart<'a> {
    pub(super) title: &'a str,
    pub(super) unit: Unit,
    pub(super) scale: Scale,
    /// First and last step of all charts, so that they can be compared.
    pub(super) steps: (f64, f64),
    /// Whether a moving average says more than the values.
    pub(super) noisy: bool,
    pub(super) series: Vec<Series<'a>>,
}

/// How values are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    /// Evenly, over the range that occurs.
    Linear,
    /// Evenly, from zero.
    FromZero,
    /// By their logarithm.
    Log,
    /// By their logarithm where they spread far.
    Auto,
}

/// The curve of one run.
#[derive(Debug)]
pub(super) struct Series<'a> {
    /// Place of the run among all: decides the colour.
    pub(super) run: usize,
    pub(super) name: &'a str,
    /// Step and value, in order of steps. What is not finite leaves a gap and a mark.
    pub(super) points: Vec<(f64, f64)>,
}

/// Colours on white, from Okabe and Ito's set, which the colour-blind can tell apart; the light ones darkened until a
/// thin line has contrast. Further runs get dashes.
pub(super) const COLORS: [&str; 6] = ["#0072b2", "#d55e00", "#008a63", "#b3478a", "#a67300", "#404040"];
/// The same on black.
pub(super) const COLORS_DARK: [&str; 6] = ["#56b4e9", "#ff8a3d", "#2fc79b", "#e79bc8", "#f0c24b", "#d8d8d8"];
const DASHES: [&str; 4] = ["", "6 3", "2 3", "8 3 2 3"];

/// Size of a chart, in units of the drawing.
pub(super) const WIDTH: f64 = 640.0;
pub(super) const HEIGHT: f64 = 320.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 36.0;
const BOTTOM: f64 = 42.0;
const PLOT: f64 = WIDTH - LEFT - RIGHT;

/// Curves with fewer points show them.
const MARKED: usize = 40;
/// Values that spread further than this go on a logarithmic axis where the chart leaves it open.
const WIDE: f64 = 30.0;

impl Chart<'_> {
    /// Whether there is anything to draw.
    pub(super) fn is_empty(&self) -> bool {
        self.series.iter().all(|s| s.points.is_empty())
    }

    /// The chart as a group whose corner is at the origin. `smooth` is the weight of the past in a moving average,
    /// from 0 (none) to below 1.
    pub(super) fn group(&self, smooth: f64) -> String {
        let mut out = String::new();
        let finite = || self.series.iter().flat_map(|s| &s.points).filter(|p| scale::is_drawable(p.1));
        let (low, high) = range(finite().map(|p| p.1));
        // A scale by logarithm cannot show what is not above zero.
        let (above, _) = range(finite().map(|p| p.1).filter(|v| *v > scale::TINY));
        let log = above.is_finite()
            && (self.scale == Scale::Log || (self.scale == Scale::Auto && low > scale::TINY && high > WIDE * low));
        let y = match (log, low.is_finite()) {
            (true, _) => Axis::log(above, high, self.unit),
            (_, true) => Axis::values(low, high, self.unit, self.scale == Scale::FromZero),
            (_, false) => Axis::values(0.0, 1.0, self.unit, true),
        };
        let frame = Frame { x: Axis::steps(self.steps.0, self.steps.1), y };
        frame.draw(&mut out);
        self.captions(&mut out, &frame, log);
        for series in &self.series {
            let name = escape(series.name);
            let _ = write!(out, "<g class=\"r{}\"><title>{name}</title>", series.run % COLORS.len());
            if self.noisy && smooth > 0.0 {
                // Of many runs at once, pale curves would hide the strong ones.
                let pale = if self.series.len() > 3 { 0.15 } else { 0.3 };
                frame.curve(&mut out, series, &series.points, pale);
                frame.curve(&mut out, series, &smoothed(&series.points, smooth), 1.0);
            } else {
                frame.curve(&mut out, series, &series.points, 1.0);
            }
            frame.marks(&mut out, series);
            out.push_str("</g>");
        }
        out
    }

    fn captions(&self, out: &mut String, frame: &Frame, log: bool) {
        let unit = frame.y.unit_name();
        let mut title = if unit.is_empty() { self.title.to_owned() } else { format!("{} ({unit})", self.title) };
        if log {
            title += ", logarithmic";
        }
        text(out, (LEFT, 20.0), "start", "title", &title);
        text(out, (LEFT + PLOT / 2.0, HEIGHT - 6.0), "middle", "tick", "step");
        let points = || self.series.iter().flat_map(|s| &s.points);
        let odd = points().filter(|p| !scale::is_drawable(p.1)).count();
        let hidden = points().filter(|p| scale::is_drawable(p.1) && !frame.y.shows(p.1)).count();
        let mut notes = Vec::new();
        if odd > 0 {
            notes.push(format!("\u{d7} not a finite number: {odd}"));
        }
        if hidden > 0 {
            notes.push(format!("not above 0: {hidden}"));
        }
        if !notes.is_empty() {
            text(out, (WIDTH - RIGHT, 20.0), "end", "tick", &notes.join(", "));
        }
    }
}

struct Frame {
    x: Axis,
    y: Axis,
}

impl Frame {
    fn left(&self, step: f64) -> f64 {
        LEFT + PLOT * self.x.position(step)
    }

    fn top(&self, value: f64) -> f64 {
        TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - self.y.position(value))
    }

    fn draw(&self, out: &mut String) {
        let bottom = HEIGHT - BOTTOM;
        let line = |out: &mut String, class, color, from: (f64, f64), to: (f64, f64)| {
            let _ = write!(
                out,
                "<line class=\"{class}\" stroke=\"{color}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
                from.0, from.1, to.0, to.1
            );
        };
        for tick in &self.y.ticks {
            let at = self.top(*tick);
            line(out, "grid", "#e3e3e3", (LEFT, at), (WIDTH - RIGHT, at));
            text(out, (LEFT - 7.0, at + 4.0), "end", "tick", &self.y.label(*tick));
        }
        for tick in &self.x.ticks {
            let at = self.left(*tick);
            line(out, "axis", "#8a8a8a", (at, bottom), (at, bottom + 4.0));
            text(out, (at, bottom + 18.0), "middle", "tick", &self.x.label(*tick));
        }
        line(out, "axis", "#8a8a8a", (LEFT, bottom), (WIDTH - RIGHT, bottom));
    }

    fn curve(&self, out: &mut String, series: &Series<'_>, points: &[(f64, f64)], opacity: f64) {
        let color = COLORS[series.run % COLORS.len()];
        let dashes = DASHES[series.run / COLORS.len() % DASHES.len()];
        let points = self.thinned(points);
        let (mut path, mut dots) = (String::new(), String::new());
        let few = points.len() <= MARKED;
        let shows = |i: usize| points.get(i).is_some_and(|p| self.y.shows(p.1));
        for (i, point) in points.iter().enumerate() {
            if !shows(i) {
                continue;
            }
            let (left, top) = (self.left(point.0), self.top(point.1));
            let begins = i == 0 || !shows(i - 1);
            let _ = write!(path, "{}{left:.1} {top:.1}", if begins { 'M' } else { 'L' });
            // A point without neighbours makes no line.
            if few || (begins && !shows(i + 1)) {
                let _ =
                    write!(dots, "<circle class=\"d\" fill=\"{color}\" cx=\"{left:.1}\" cy=\"{top:.1}\" r=\"2.5\"/>");
            }
        }
        if path.is_empty() {
            return;
        }
        let _ = write!(
            out,
            "<g opacity=\"{opacity}\"><path class=\"l\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.6\" \
             stroke-linejoin=\"round\""
        );
        if !dashes.is_empty() && opacity == 1.0 {
            let _ = write!(out, " stroke-dasharray=\"{dashes}\"");
        }
        let _ = write!(out, " d=\"{path}\"/>{dots}</g>");
    }

    /// Crosses at the foot of the chart where a value is no number.
    fn marks(&self, out: &mut String, series: &Series<'_>) {
        let color = COLORS[series.run % COLORS.len()];
        let mut path = String::new();
        let mut pixel = None;
        for (step, _) in series.points.iter().filter(|p| !scale::is_drawable(p.1)) {
            let (left, top) = (self.left(*step), HEIGHT - BOTTOM - 6.0);
            if pixel.replace(left as i64) != Some(left as i64) {
                let _ = write!(path, "M{:.1} {:.1}l6 6m0 -6l-6 6", left - 3.0, top - 3.0);
            }
        }
        if !path.is_empty() {
            let _ =
                write!(out, "<path class=\"l\" fill=\"none\" stroke=\"{color}\" stroke-width=\"1.5\" d=\"{path}\"/>");
        }
    }

    /// No more points than can be seen: of every pixel the first, the lowest, the highest and the last, so that no peak
    /// gets lost. A pixel without any value stays a gap.
    fn thinned(&self, points: &[(f64, f64)]) -> Vec<(f64, f64)> {
        if points.len() as f64 <= 2.0 * PLOT {
            return points.to_vec();
        }
        let mut out = Vec::new();
        let pixel = |p: &(f64, f64)| self.left(p.0) as i64;
        for bucket in points.chunk_by(|a, b| pixel(a) == pixel(b)) {
            let seen: Vec<usize> = (0..bucket.len()).filter(|i| self.y.shows(bucket[*i].1)).collect();
            let by_value = |a: &&usize, b: &&usize| bucket[**a].1.total_cmp(&bucket[**b].1);
            let extremes = [seen.first(), seen.iter().min_by(by_value), seen.iter().max_by(by_value), seen.last()];
            let mut kept: Vec<usize> = extremes.into_iter().flatten().copied().collect();
            kept.sort_unstable();
            kept.dedup();
            if kept.is_empty() {
                out.push((bucket[0].0, f64::NAN));
            }
            out.extend(kept.into_iter().map(|i| bucket[i]));
        }
        out
    }
}

/// An exponential moving average, free of the pull of its start, as TensorBoard's. Gaps stay gaps.
fn smoothed(points: &[(f64, f64)], weight: f64) -> Vec<(f64, f64)> {
    let (mut sum, mut total) = (0.0, 0.0);
    points
        .iter()
        .map(|&(step, value)| {
            if !scale::is_drawable(value) {
                return (step, value);
            }
            sum = weight * sum + (1.0 - weight) * value;
            total = weight * total + (1.0 - weight);
            (step, sum / total)
        })
        .collect()
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
}

/// A line of text. Classes `title` and `tick` are the two sizes.
pub(super) fn text(out: &mut String, at: (f64, f64), anchor: &str, class: &str, content: &str) {
    let (size, color, weight) =
        if class == "title" { (14, "#1b1b1b", " font-weight=\"600\"") } else { (12, "#5a5a5a", "") };
    let _ = write!(
        out,
        "<text class=\"{class}\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\" \
         fill=\"{color}\"{weight}>{}</text>",
        at.0,
        at.1,
        escape(content)
    );
}

/// A short piece of a run's line, for a legend.
pub(super) fn sample(run: usize, at: (f64, f64)) -> String {
    let dashes = DASHES[run / COLORS.len() % DASHES.len()];
    format!(
        "<g class=\"r{}\"><path class=\"l\" fill=\"none\" stroke=\"{}\" stroke-width=\"2.5\" stroke-dasharray=\"{}\" \
         d=\"M{:.1} {:.1}h22\"/></g>",
        run % COLORS.len(),
        COLORS[run % COLORS.len()],
        if dashes.is_empty() { "none" } else { dashes },
        at.0,
        at.1
    )
}

/// Text that means nothing to XML or HTML. Control characters have no place there.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(points: Vec<(f64, f64)>, scale: Scale) -> String {
        let steps = points.iter().fold((0.0, 0.0), |(low, high): (f64, f64), p| (low.min(p.0), high.max(p.0)));
        let series = vec![Series { run: 0, name: "a<b", points }];
        Chart { title: "Loss", unit: Unit::Plain, scale, steps, noisy: true, series }.group(0.0)
    }

    fn coordinates(svg: &str) -> Vec<f64> {
        svg.split(['"', ' ', 'M', 'L', 'm', 'l']).filter_map(|w| w.parse().ok()).collect()
    }

    #[test]
    fn few_points() {
        let one = chart(vec![(3.0, 2.0)], Scale::Linear);
        assert_eq!(one.matches("<circle").count(), 1);
        assert!(one.contains("a&lt;b") && !one.contains("a<b"));
        let two = chart(vec![(0.0, 2.0), (1.0, 1.0)], Scale::Linear);
        assert_eq!((two.matches("<circle").count(), two.matches('L').count() - two.matches("Loss").count()), (2, 1));
        for points in [vec![], vec![(0.0, f64::NAN)]] {
            let svg = chart(points, Scale::Auto);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        }
    }

    #[test]
    fn gaps() {
        let svg = chart(vec![(0.0, 1.0), (1.0, 2.0), (2.0, f64::NAN), (3.0, f64::INFINITY), (4.0, 1.5)], Scale::Linear);
        assert!(svg.contains("not a finite number: 2"));
        let path = svg.split(" d=\"").nth(1).unwrap().split('"').next().unwrap();
        assert_eq!((path.matches('M').count(), path.matches('L').count()), (2, 1), "{path}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn many_points_become_few_and_no_peak_gets_lost() {
        let points: Vec<_> = (0..100_000).map(|i| (f64::from(i), if i == 54_321 { 50.0 } else { 1.0 })).collect();
        let svg = chart(points, Scale::Linear);
        assert!(svg.len() < 60_000, "{}", svg.len());
        // The peak is the highest value, so it is what the path reaches at the top.
        let top = coordinates(&svg).into_iter().filter(|v| *v > TOP && *v < TOP + 15.0).count();
        assert!(top > 0);
    }

    #[test]
    fn logarithms() {
        let spread = vec![(0.0, 300.0), (1.0, 1.0)];
        assert!(chart(spread.clone(), Scale::Auto).contains("Loss, logarithmic"));
        assert!(!chart(spread, Scale::Linear).contains("logarithmic"));
        let svg = chart(vec![(0.0, 10.0), (1.0, 0.0), (2.0, 1.0)], Scale::Log);
        assert!(svg.contains("not above 0: 1") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(!chart(vec![(0.0, 0.0)], Scale::Log).contains("logarithmic"));
    }

    #[test]
    fn any_values() {
        let odd =
            [0.0, -0.0, 1.0, -1.0, 5e-324, 1e-300, 1e299, -1e299, f64::MAX, f64::MIN, f64::NAN, f64::INFINITY, 3e38];
        for a in odd {
            for b in odd {
                for c in odd {
                    for scale in [Scale::Linear, Scale::FromZero, Scale::Log, Scale::Auto] {
                        let svg = chart(vec![(0.0, a), (1.0, b), (2.0, c)], scale);
                        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{a} {b} {c} {scale:?}: {svg}");
                        assert!(svg.len() < 20_000);
                    }
                }
            }
        }
    }

    #[test]
    fn smoothing() {
        let s = smoothed(&[(0.0, 4.0), (1.0, f64::NAN), (2.0, 0.0)], 0.5);
        assert_eq!(s[0].1, 4.0);
        assert!(s[1].1.is_nan());
        // (0.5 * 2 + 0.5 * 0) / 0.75
        assert!((s[2].1 - 4.0 / 3.0).abs() < 1e-12);
    }
}
