// What of a text is not in another, word by word.

/**
 * The parts of `text`, each with whether it is new against `other`, by the longest common sequence of words.
 * @param {string} text
 * @param {string} other
 * @returns {[string, boolean][]}
 */
export function differences(text, other) {
  const own = text.split(/(\s+)/).filter(Boolean);
  const its = other.split(/(\s+)/).filter(Boolean);
  if (own.length * its.length > 4e6) return [[text, text !== other]];
  const lengths = Array.from({ length: own.length + 1 }, () => new Uint16Array(its.length + 1));
  for (let i = own.length - 1; i >= 0; i--)
    for (let j = its.length - 1; j >= 0; j--)
      lengths[i][j] = own[i] === its[j] ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
  const parts = [];
  const add = (word, isNew) => {
    const last = parts.at(-1);
    if (last?.[1] === isNew) last[0] += word;
    else parts.push([word, isNew]);
  };
  for (let i = 0, j = 0; i < own.length; ) {
    if (j < its.length && own[i] === its[j]) {
      add(own[i], false);
      i++;
      j++;
    } else if (j < its.length && lengths[i][j + 1] >= lengths[i + 1][j]) j++;
    else add(own[i++], true);
  }
  return parts;
}
